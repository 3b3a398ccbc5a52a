"""The keys of LoRA files: every spelling that is met, as one name of the layer and one of the tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

PARTS = (
    "lora_up.weight",
    "lora_down.weight",
    "lora_mid.weight",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "a1.weight",
    "a2.weight",
    "b1.weight",
    "b2.weight",
    "oft_blocks",
    "w_norm",
    "b_norm",
    "diff",
    "diff_b",
    "set_weight",
)
"""What a layer's change is made of, in the names of kohya and LyCORIS; `lora_kinds` says what each kind needs."""
_BESIDE = ("alpha", "dora_scale", "reshape_weight", "rescale")
"""What qualifies a change."""
_SPELLINGS = {
    f"{start}{one}{end}": f"lora_{name}.weight"
    for start, end in ((".lora_", ".weight"), (".lora_", ".default.weight"), (".lora_", ""))
    for one, name in (("A", "down"), ("B", "up"))
} | {
    f"{start}.{name}.weight": f"lora_{name}.weight"
    for start in ("_lora", ".lora", ".lora_linear_layer")
    for name in ("down", "up")
}
"""How PEFT's and diffusers' keys end, and what kohya calls the same."""
_ENDINGS = {f".{part}": part for part in (*PARTS, *_BESIDE)} | _SPELLINGS

_FOREIGN = (
    (".on_input", "IA3"),
    (".ia3_l", "IA3"),
    (".lora_magnitude_vector", "DoRA as PEFT writes it"),
    (".lora_embedding_", "embeddings as PEFT writes them"),
    (".lora_B.bias", "LoRA with biases as PEFT writes it"),
    (".oft_diag", "OFT of early LyCORIS"),
    (".oft_r", "OFT as PEFT writes it"),
    (".boft_", "BOFT as PEFT writes it"),
    (".vera_lambda_", "VeRA"),
    (".hra_u", "HRA"),
    (".bias_indices", "sparse biases of LyCORIS"),
    (".lokr_t1", "LoKr with lokr_t1"),
)
"""Tensors of kinds that ComfyUI's loader does not know, in lower case but for PEFT's A and B."""

_PEFT = "base_model.model."
_UNET = "lora_unet_"
_BARE = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "conv_norm_out", "time_embedding.",
         "add_embedding.", "class_embedding.")  # fmt: skip
"""How names begin in diffusers' UNet."""
_TEXT = ("lora_te", "lora_prior_te", "text_encoder", "text_model.")


@dataclass(frozen=True)
class LoraKeys:
    """A LoRA file's tensors by layer.

    Args:
        layers: name of the layer, in kohya's spelling or ComfyUI's own ("diffusion_model.…") -> its tensors by
            their names in `PARTS` and beside.
        others: keys that are none of these.
    """

    layers: Mapping[str, Mapping[str, Tensor]]
    others: tuple[str, ...]

    @property
    def foreign(self) -> Mapping[str, int]:
        """Kinds that ComfyUI's loader does not know -> number of their tensors."""
        return Counter(kind for kind in map(_foreign, self.others) if kind)


def read_keys(state: Mapping[str, Tensor]) -> LoraKeys:
    """The tensors of a LoRA file by layer.

    Raises:
        ValueError: a tensor is there twice, in two spellings.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in state.items():
        ending = _ending(key)
        if ending is None:
            others.append(key)
            continue
        parts = layers.setdefault(_layer(key.removesuffix(ending)), {})
        if _ENDINGS[ending] in parts:
            raise ValueError(f"the LoRA holds the tensor '{key}' twice, in two spellings; choose another file")
        parts[_ENDINGS[ending]] = tensor
    return LoraKeys(layers, tuple(others))


def is_lora(keys: Iterable[str]) -> bool:
    """Whether any of a file's keys is one of a LoRA's, of whatever kind."""
    return any(_ENDINGS.get(_ending(key) or "") in PARTS or _foreign(key) for key in keys)


def is_text(layer: str) -> bool:
    """Whether a layer's name is that of a text encoder's."""
    return layer.startswith(_TEXT)


def _ending(key: str) -> str | None:
    return next((ending for ending in _ENDINGS if key.endswith(ending)), None)


def _foreign(key: str) -> str:
    folded = key.replace(".oft_R", ".oft_r")
    return next((kind for mark, kind in _FOREIGN if mark in folded), "")


def _layer(name: str) -> str:
    """A layer's name in kohya's spelling; a dotted name of ComfyUI's own or of a text encoder as it is."""
    name = name.replace(_PEFT, "")
    if name.startswith("lycoris_"):
        return _UNET + name.removeprefix("lycoris_")
    inner = name.removeprefix("unet.")
    if inner == name and not name.startswith(_BARE):
        return name.removeprefix("model.") if name.startswith("model.diffusion_model.") else name
    inner = inner.replace(".processor.", ".")
    return _UNET + (f"{inner}.0" if inner.endswith(".to_out") else inner).replace(".", "_")
