"""LoRA files as patches on a model and a text encoder."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ...training import checkpoint_file
from ..lora_fit import layers_of, require_fit
from ..port import HostError
from .checkpoint import read_weights
from .model import Model
from .text import TextEncoder
from .weights import Patch

logger = logging.getLogger(__name__)

_SPELLINGS = (
    (re.compile(r"(.+)\.lora_A(?:\.default)?\.weight"), ".lora_down.weight"),
    (re.compile(r"(.+)\.lora_B(?:\.default)?\.weight"), ".lora_up.weight"),
    (re.compile(r"(.+)[._]lora\.down\.weight"), ".lora_down.weight"),
    (re.compile(r"(.+)[._]lora\.up\.weight"), ".lora_up.weight"),
    (re.compile(r"(.+)\.lora_linear_layer\.down\.weight"), ".lora_down.weight"),
    (re.compile(r"(.+)\.lora_linear_layer\.up\.weight"), ".lora_up.weight"),
)
"""Other spellings of LoRA keys (peft, diffusers) and what kohya calls the same."""
_READ = (".lora_down.weight", ".lora_up.weight", ".alpha", ".diff", ".diff_b", ".reshape_weight", ".dora_scale")


def read_lora(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file; HostError naming it if it cannot be read."""
    return read_weights(path, name)


def trained_metadata(path: Path) -> dict[str, str] | None:
    """Metadata of a LoRA that Diff2Flow trained; None for every other file."""
    return checkpoint_file.trained_metadata(path) or None


def apply_lora(
    model: Model | None,
    clip: TextEncoder | None,
    state: Mapping[str, Tensor],
    strengths: tuple[float, float],
    metadata: Mapping[str, str] | None = None,
) -> tuple[Model | None, TextEncoder | None]:
    """Clones with the LoRA added; keys that fit nothing are logged.

    Args:
        strengths: factors for the model and for the text encoder; at 0 nothing changes, not by a bit.
        metadata: of the LoRA, joins the model's facts.

    Raises:
        HostError: no layer of the LoRA exists in the model, or one has another shape.
    """
    state = {_kohya(key): value for key, value in state.items()}
    shapes = {name: _shape(owner, module) for owner, names in _owners(model, clip) for name, module in names.items()}
    family = model.base.layout.family if model else clip.family if clip else ""
    _require_layers(state)
    require_fit(state, shapes, family, (metadata or {}).get("ss_base_model_version", ""))
    if model is not None:
        model = model.with_patches(
            _patches(state, model.base.layer_names, model.base.weights.module, strengths[0]),
            metadata if strengths[0] else None,
        )
    if clip is not None:
        clip = clip.with_patches(_patches(state, clip.layer_names(), clip.weights.module, strengths[1]))
    _log_unused(state, set(shapes), clip is not None)
    return model, clip


def _owners(model: Model | None, clip: TextEncoder | None) -> list[tuple[nn.Module, Mapping[str, str]]]:
    owners: list[tuple[nn.Module, Mapping[str, str]]] = []
    if model is not None:
        owners.append((model.base.weights.module, model.base.layer_names))
    if clip is not None:
        owners.append((clip.weights.module, clip.layer_names()))
    return owners


def _kohya(key: str) -> str:
    for pattern, ending in _SPELLINGS:
        match = pattern.fullmatch(key)
        if match:
            return match[1] + ending
    return key


def _require_layers(state: Mapping[str, Tensor]) -> None:
    if not layers_of(state):
        kinds = [
            kind
            for mark, kind in ((".hada_w1_a", "LoHa"), (".lokr_w1", "LoKr"), (".oft_blocks", "OFT"))
            if any(mark in k for k in state)
        ]
        what = (
            f"a {kinds[0]}, which headless does not load"
            if kinds
            else f"no LoRA (its first key is '{next(iter(state), '')}')"
        )
        raise HostError(f"the file is {what}; choose a LoRA with lora_up and lora_down weights")


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(module.get_submodule(name).weight.shape)


def _patches(
    state: Mapping[str, Tensor], names: Mapping[str, str], module: nn.Module, strength: float
) -> tuple[Patch, ...]:
    patches = []
    for layer in layers_of(state):
        if layer in names:
            patches += _layer_patches(state, layer, names[layer], module, strength)
    return tuple(patches)


def _layer_patches(
    state: Mapping[str, Tensor], layer: str, target: str, module: nn.Module, strength: float
) -> list[Patch]:
    up, down = state.get(f"{layer}.lora_up.weight"), state.get(f"{layer}.lora_down.weight")
    widened = state.get(f"{layer}.reshape_weight")
    shape = None if widened is None else tuple(int(size) for size in widened)
    patches = []
    if up is not None and down is not None:
        alpha = state.get(f"{layer}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        dora_scale = state.get(f"{layer}.dora_scale")
        lora = {"up": up, "down": down, "scale": scale, "dora_scale": dora_scale}
        patches.append(Patch(f"{target}.weight", strength, shape=shape, **lora))
    if f"{layer}.diff" in state:
        patches.append(Patch(f"{target}.weight", strength, difference=state[f"{layer}.diff"], shape=shape))
    if f"{layer}.diff_b" in state and module.get_submodule(target).bias is not None:
        patches.append(Patch(f"{target}.bias", strength, difference=state[f"{layer}.diff_b"]))
    return patches


def _log_unused(state: Mapping[str, Tensor], known: set[str], with_clip: bool) -> None:
    """Names what was not used; text encoder keys only where a text encoder was there to take them."""
    for key in state:
        layer = next((key.removesuffix(ending) for ending in _READ if key.endswith(ending)), None)
        for_clip = key.startswith(("lora_te", "text_encoder"))
        if layer not in known and (with_clip or not for_clip):
            logger.warning("lora key not loaded: %s", key)
