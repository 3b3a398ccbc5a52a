"""The CLIP socket: Stable Diffusion's text encoders, built from a checkpoint's weights without a hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import prompts
from .tokens import END, START, tokenize
from .weights import Patch, Weights

_STORED = torch.float16
"""ComfyUI keeps text encoders in half precision and computes in float32: the same values are used here."""
_PENULTIMATE = 22
"""SD2 reads OpenCLIP-H's 24 layers at the last but one; files that were saved without the last have 23."""
_OPEN_CLIP = "open_clip."
_SD1_PREFIX, _SD2_PREFIXES = (
    "cond_stage_model.transformer.",
    ("cond_stage_model.model.", "conditioner.embedders.0.model."),
)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A text encoder with its patches.

    Args:
        weights: transformers' CLIPTextModel.
        family: "SD1" (last layer, padded with end marks) or "SD2" (last layer but one, padded with 0).
        layer: number of layers that the context has gone through; the final norm follows.
        projection: of the pooled output, (width, width), or None.
        patches: LoRAs, in the order they were applied.
    """

    weights: Weights
    family: str
    layer: int
    projection: Tensor | None = None
    patches: tuple[Patch, ...] = ()

    @property
    def pad(self) -> int:
        """Token id that fills a chunk."""
        return END if self.family == "SD1" else 0

    def with_patches(self, patches: tuple[Patch, ...]) -> TextEncoder:
        """A clone with more patches."""
        return replace(self, patches=self.patches + patches)

    def layer_names(self) -> dict[str, str]:
        """Every name that LoRA files use for a layer -> its name in the module."""
        names = {}
        for module, layer in self.weights.module.named_modules():
            if isinstance(layer, nn.Linear):
                full = f"text_model.{module.removeprefix('text_model.')}"
                flat = full.replace(".", "_")
                names |= dict.fromkeys((f"lora_te_{flat}", f"lora_te1_{flat}", f"text_encoder.{full}"), module)
        return names

    @torch.no_grad()
    def encode(self, text: str) -> list[list[Any]]:
        """CONDITIONING of a prompt: context (1, 77 · chunks, width) and pooled output (1, width).

        A token's weight w moves its embedding away from the empty prompt's: empty + w (embedding - empty).
        """
        parts = prompts.chunks(text, tokenize, self.pad)
        weighted = any(weight != 1.0 for chunk in parts for weight in chunk.weights)
        context, pooled = self._encoded([*parts, prompts.empty_chunk(self.pad)] if weighted else parts)
        if weighted:
            context = self._interpolated(context, [chunk.weights for chunk in parts])
        return [[context.flatten(0, 1)[None].cpu(), {"pooled_output": pooled[:1].cpu()}]]

    @staticmethod
    def _interpolated(context: Tensor, weights: list[tuple[float, ...]]) -> Tensor:
        empty = context[-1]
        factor = torch.tensor(weights, device=context.device)[..., None]
        return torch.where(factor == 1.0, context[:-1], (context[:-1] - empty) * factor + empty)

    def _encoded(self, parts: list[prompts.Chunk]) -> tuple[Tensor, Tensor]:
        """Context (chunks, 77, width) and pooled output (chunks, width)."""
        module = self.weights.merged(self.patches)
        ids = torch.tensor([chunk.ids for chunk in parts], device=next(module.parameters()).device)
        out = module(input_ids=ids, output_hidden_states=True)
        context, pooled = out.last_hidden_state, out.pooler_output
        if self.layer < len(out.hidden_states) - 1:
            context = _final_norm(module)(out.hidden_states[self.layer])
        return context.float(), pooled if self.projection is None else pooled @ self.projection.T.to(pooled)


def read_text_encoder(state: Mapping[str, Tensor], family: str, name: str, device: torch.device) -> TextEncoder | None:
    """The checkpoint's text encoder; None if it has none.

    Raises:
        HostError: the encoder is incomplete.
    """
    weights, projection = _sd1_weights(state), None
    if family == "SD2":
        weights, projection = _sd2_weights(state)
    if "embeddings.token_embedding.weight" not in weights:
        return None
    module = _build(weights, family, name)
    layers = module.config.num_hidden_layers
    if projection is not None:
        projection = _rounded(projection).to(device)
    used = layers if family == "SD1" else layers - 1 if layers != _PENULTIMATE + 1 else layers
    return TextEncoder(Weights(module.to(device), rounding=_STORED), family, used, projection)


def _build(weights: Mapping[str, Tensor], family: str, name: str) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    from .checkpoint import fill

    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    layers = 1 + max(
        (int(m[1]) for m in (re.match(r"encoder\.layers\.(\d+)\.", key) for key in weights) if m), default=-1
    )
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=weights["embeddings.position_embedding.weight"].shape[0],
        hidden_act="quick_gelu" if family == "SD1" else "gelu",
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


def _sd1_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP-L's weights without prefixes; older files lack "text_model."."""
    return {
        key.removeprefix(_SD1_PREFIX).removeprefix("text_model."): value
        for key, value in state.items()
        if key.startswith(_SD1_PREFIX) and not key.endswith("position_ids")
    }


def _sd2_weights(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """OpenCLIP's weights in transformers' names without "text_model.", and its projection.

    diffusers' conversion drops the last layer and the projection of keys with SD2's own prefix; ours it leaves whole.
    """
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    kept = {_OPEN_CLIP + key.removeprefix(p): v for p in _SD2_PREFIXES for key, v in state.items() if key.startswith(p)}
    if f"{_OPEN_CLIP}token_embedding.weight" not in kept:
        return {}, None
    if f"{_OPEN_CLIP}text_projection.weight" in kept:
        kept[f"{_OPEN_CLIP}text_projection"] = kept.pop(f"{_OPEN_CLIP}text_projection.weight").T
    width = kept[f"{_OPEN_CLIP}token_embedding.weight"].shape[1]
    converted = convert_open_clip_checkpoint(_Sized(width), kept, prefix=_OPEN_CLIP)
    projection = converted.pop("text_projection.weight", None)
    return {key.removeprefix("text_model."): value for key, value in converted.items()}, projection


class _Sized:
    """Stands in for the text model whose width diffusers' conversion asks for."""

    def __init__(self, width: int) -> None:
        self.config = type("Config", (), {"hidden_size": width})()


def _final_norm(module: nn.Module) -> nn.Module:
    return getattr(module, "text_model", module).final_layer_norm


def _rounded(value: Tensor) -> Tensor:
    return value.to(_STORED).float() if value.is_floating_point() else value
