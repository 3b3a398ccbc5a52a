"""LoRA files as patches on a model and a text encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ...training import checkpoint_file
from ...training.lora_kinds import Change
from ..lora_fit import Target, fitting
from .checkpoint import read_weights
from .model import Model
from .text import TextEncoder
from .weights import Patch

logger = logging.getLogger(__name__)

Owner = tuple[nn.Module, Mapping[str, str]]
"""A network, and every name that `training.lora_keys` gives a layer of it -> path of the layer or of its bias."""


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
    """Clones with the LoRA added; what fits nothing is logged.

    Args:
        strengths: factors for the model and for the text encoder; at 0 nothing changes, not by a bit.
        metadata: of the LoRA, joins the model's facts.

    Raises:
        HostError: no layer of the LoRA exists in the model, one has another shape, or is of an unknown kind.
    """
    network = None if model is None else (model.base.weights.module, model.base.layer_names)
    encoder = None if clip is None else (clip.weights.module, clip.layer_names())
    shapes = {name: _shape(*owner, name) for owner in (network, encoder) if owner for name in owner[1]}
    family = model.base.layout.family if model else clip.family if clip else ""
    trained_for = (metadata or {}).get("ss_base_model_version", "")
    found = fitting(state, Target(shapes, family, clip is not None, _widened(model)), trained_for).changes
    if model is not None and network is not None:
        model = model.with_patches(_patches(found, network, strengths[0]), metadata if strengths[0] else None)
    if clip is not None and encoder is not None:
        clip = clip.with_patches(_patches(found, encoder, strengths[1]))
    return model, clip


def _shape(module: nn.Module, names: Mapping[str, str], name: str) -> tuple[int, ...]:
    return tuple(module.get_parameter(_weight(names[name])).shape)


def _widened(model: Model | None) -> dict[str, tuple[int, ...]]:
    """Shapes of what LoRAs before have widened, by every name of the layer."""
    patches = () if model is None else model.patches
    shapes = {patch.target: patch.shape for patch in patches if patch.shape and patch.strength}
    names = {} if model is None else model.base.layer_names
    return {name: shapes[_weight(path)] for name, path in names.items() if _weight(path) in shapes}


def _weight(path: str) -> str:
    return path if path.endswith(".bias") else f"{path}.weight"


def _patches(found: Mapping[str, Mapping[str, Change]], owner: Owner, strength: float) -> tuple[Patch, ...]:
    module, names = owner
    known = dict(module.named_parameters())
    patches = []
    for layer, changes in found.items():
        for part, change in changes.items() if layer in names else ():
            target = _weight(names[layer]) if part == "weight" else f"{names[layer]}.bias"
            if target in known:
                patches.append(Patch(target, strength, change))
            else:
                logger.warning("the LoRA's bias for '%s' is left out: the layer has none", layer)
    return tuple(patches)
