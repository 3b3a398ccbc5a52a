"""Stable Diffusion's text encoders as modules, built from a checkpoint's weights without a hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..port import HostError
from .tokens import END, START

_STORED = torch.float16
"""ComfyUI keeps text encoders in half precision and computes in float32: the same values are used here."""
_SHORTENED = 23
"""OpenCLIP-H has 24 layers and SD2 reads the last but one; files that were saved without the last have 23."""
_HEAD_SIZE = 64
_OPEN_CLIP = "open_clip."


@dataclass(frozen=True)
class Kind:
    """How a Stable Diffusion family reads one of its text encoders.

    Args:
        key: ComfyUI's letter for it ("l", "h", "g").
        prefixes: of its keys in a checkpoint; the first that is there counts.
        open_clip: whether the keys are OpenCLIP's, else transformers'.
        pad: token id that fills a chunk.
        skipped: layers at the end that the context has not gone through; the pooled output has.
        normed: whether the final norm is applied to the context too.
        projected: whether a projection of the pooled output belongs to it.
        lora: how LoRA files begin its layers' names: kohya's spellings, then diffusers'.
    """

    key: str
    prefixes: tuple[str, ...]
    open_clip: bool
    pad: int
    skipped: int
    normed: bool
    projected: bool
    lora: tuple[tuple[str, ...], str]


_ONLY = (("lora_te", "lora_te1"), "text_encoder")
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "SD1": (Kind("l", ("cond_stage_model.transformer.",), False, END, 0, True, False, _ONLY),),
    "SD2": (Kind("h", ("cond_stage_model.model.", "conditioner.embedders.0.model."), True, 0, 1, True, False, _ONLY),),
    "SDXL": (
        Kind("l", ("conditioner.embedders.0.transformer.",), False, END, 1, False, False, _ONLY),
        Kind("g", ("conditioner.embedders.1.model.",), True, 0, 1, False, True, (("lora_te2",), "text_encoder_2")),
    ),
}
"""The text encoders of a family, in the order in which their contexts are put side by side."""


class Tower(nn.Module):
    """One text encoder, read as its kind says.

    Args:
        kind: how it is read.
        model: transformers' CLIPTextModel.
        projection: of the pooled output, or None.
    """

    def __init__(self, kind: Kind, model: nn.Module, projection: nn.Linear | None) -> None:
        super().__init__()
        self.kind, self.model, self.projection = kind, model, projection
        layers = model.config.num_hidden_layers
        shortened = kind.key == "h" and layers == _SHORTENED
        self.layer = layers if shortened else layers - kind.skipped

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Context (chunks, 77, width) and pooled output (chunks, width), float32, of token ids (chunks, 77)."""
        out = self.model(input_ids=ids, output_hidden_states=True)
        last = self.layer == len(out.hidden_states) - 1
        context = out.hidden_states[self.layer]
        if self.kind.normed:
            context = out.last_hidden_state if last else self._norm(context)
        pooled = out.pooler_output if self.projection is None else self.projection(out.pooler_output)
        return context.float(), pooled.float()

    def _norm(self, context: Tensor) -> Tensor:
        return getattr(self.model, "text_model", self.model).final_layer_norm(context)


def read_towers(state: Mapping[str, Tensor], family: str, name: str) -> nn.ModuleDict | None:
    """The checkpoint's text encoders by their kinds' keys; None if it has none.

    Raises:
        HostError: an encoder is incomplete, or is not there while the family's other one is.
    """
    found = {kind: weights for kind in KINDS[family] if (weights := _weights(state, kind))}
    if not found:
        return None
    for kind in KINDS[family]:
        if kind not in found:
            raise HostError(
                f"'{name}' has only one of {family}'s {len(KINDS[family])} text encoders ('{kind.prefixes[0]}' is"
                " missing): the file is incomplete; copy it again or choose another"
            )
    return nn.ModuleDict({kind.key: _tower(kind, weights, name) for kind, weights in found.items()})


def _tower(kind: Kind, weights: dict[str, Tensor], name: str) -> Tower:
    projection = weights.pop("text_projection.weight", None)
    if kind.projected and projection is None:
        raise HostError(
            f"'{name}' lacks the weight '{kind.prefixes[0]}text_projection': the file is incomplete; copy it again or"
            " choose another"
        )
    return Tower(kind, _build(kind, weights, name), None if projection is None else _linear(projection))


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(_rounded(weight).contiguous(), requires_grad=False)
    return layer


def _build(kind: Kind, weights: Mapping[str, Tensor], name: str) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    from .checkpoint import fill

    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    layers = [int(m[1]) for m in (re.match(r"encoder\.layers\.(\d+)\.", key) for key in weights) if m]
    if not layers:
        raise HostError(f"'{name}' lacks the layers of its text encoder: the file is incomplete; copy it again")
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + max(layers),
        num_attention_heads=max(1, width // _HEAD_SIZE),
        max_position_embeddings=weights["embeddings.position_embedding.weight"].shape[0],
        hidden_act="gelu" if kind.open_clip else "quick_gelu",
        projection_dim=width,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.device("meta"):
        module = CLIPTextModel(config)
    outer = "text_model." if any(key.startswith("text_model.") for key in module.state_dict()) else ""
    fill(module, {outer + key: _rounded(value) for key, value in weights.items()}, name, "text encoder")
    _restore_positions(module)
    return module


def _restore_positions(module: nn.Module) -> None:
    """Position ids are no weight of the file; built on the meta device they have no values yet."""
    for part in module.modules():
        if "position_ids" in part._buffers:
            positions = torch.arange(module.config.max_position_embeddings)[None]
            part.register_buffer("position_ids", positions, persistent=False)


def _weights(state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """A text encoder's weights in transformers' names without "text_model."; empty if it is not there."""
    for prefix in kind.prefixes:
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        weights = _from_open_clip(own) if kind.open_clip else _from_transformers(own)
        if "embeddings.token_embedding.weight" in weights:
            return weights
    return {}


def _from_transformers(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Older SD1 files lack "text_model."."""
    inner = {key.removeprefix("text_model."): value for key, value in own.items()}
    return {key: value for key, value in inner.items() if key.startswith(("embeddings.", "encoder.", "final_layer"))
            and not key.endswith("position_ids")}  # fmt: skip


def _from_open_clip(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' conversion drops the last layer and the projection of keys with SD2's own prefix; ours it leaves."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    kept = {_OPEN_CLIP + key: value for key, value in own.items()}
    if f"{_OPEN_CLIP}token_embedding.weight" not in kept:
        return {}
    if f"{_OPEN_CLIP}text_projection.weight" in kept:
        kept[f"{_OPEN_CLIP}text_projection"] = kept.pop(f"{_OPEN_CLIP}text_projection.weight").T
    width = kept[f"{_OPEN_CLIP}token_embedding.weight"].shape[1]
    converted = convert_open_clip_checkpoint(_Sized(width), kept, prefix=_OPEN_CLIP)
    return {key.removeprefix("text_model."): value for key, value in converted.items()}


class _Sized:
    """Stands in for the text model whose width diffusers' conversion asks for."""

    def __init__(self, width: int) -> None:
        self.config = type("Config", (), {"hidden_size": width})()


def _rounded(value: Tensor) -> Tensor:
    return value.to(_STORED).float() if value.is_floating_point() else value
