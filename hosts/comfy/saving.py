"""A MODEL, CLIP and VAE as the tensors of one checkpoint file, by ComfyUI's own names and its own LoRA arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.sd1_clip
import torch
from torch import Tensor

from ...training.checkpoint_file import StoredTensor
from ..port import HostError
from . import models

_UNET = "diffusion_model."
_SCALED = ("scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant", "scaled_fp8")
"""Ends of keys that go with weights in an 8-bit format with scales of its own."""

_SCALE, _PROJECTION = "logit_scale", "text_projection.weight"
"""Weights of text encoders that nothing reads; the projection is read in SDXL alone."""


def checkpoint_tensors(model: Any, clip: Any, vae: Any) -> dict[str, StoredTensor]:
    """The checkpoint that CheckpointSave would write, without markers; weights are merged in float32, one at a time.

    Object patches, hooks and wrappers (FreeU, IP-Adapter, ControlNet) are no weights: they stay outside, as there.

    Raises:
        HostError: the model's weights are in an 8-bit format, or the CLIP is of another family.
    """
    _require_family(model, clip)
    config = model.model.model_config
    unet = {key.removeprefix(_UNET): tensor for key, tensor in _merged(model, _UNET).items()}
    text = config.process_clip_state_dict_for_saving(_text(clip, models.family(model)))
    pixels = config.process_vae_state_dict_for_saving(vae.get_sd())
    return {
        **config.process_unet_state_dict_for_saving(unet),
        **{key: StoredTensor.of(tensor) for key, tensor in {**text, **pixels}.items()},
    }


def patched(thing: Any) -> bool:
    """Whether a LoRA is applied to a MODEL or CLIP."""
    return bool(getattr(thing, "patcher", thing).patches)


def clip_merges() -> list[tuple[str, str]]:
    """The merge rules of the tokenizer that ComfyUI brings."""
    file = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer" / "merges.txt"
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#version"))
    return [(line[0], line[1]) for line in lines if line]


def _text(clip: Any, family: str) -> dict[str, Tensor]:
    """The text encoders' merged weights, without what nothing reads: ComfyUI leaves in a weight that the checkpoint
    lacks whatever the memory held before."""
    weights = {key: tensor.read() for key, tensor in _merged(clip.patcher).items() if not key.endswith(_SCALE)}
    if family == "SDXL":
        return weights
    return {key: value for key, value in weights.items() if not key.endswith(_PROJECTION) or value.isfinite().all()}


_TEXTS = {"SD1": "clip_l", "SD2": "clip_h", "SDXL": "clip_g"}


def _require_family(model: Any, clip: Any) -> None:
    family = models.family(model)
    if not hasattr(clip.cond_stage_model, _TEXTS[family]):
        raise HostError(
            f"clip: a {type(clip.cond_stage_model).__name__} cannot go into a checkpoint of {family}; connect the CLIP"
            " of the same checkpoint"
        )


def _merged(patcher: Any, prefix: str | None = None) -> dict[str, StoredTensor]:
    """The weights whose keys begin so, each merged with its patches when it is read."""
    scaled = next((key for key in patcher.model_state_dict(prefix) if key.endswith(_SCALED)), None)
    if scaled is not None:
        raise HostError(
            f"the weights are in an 8-bit format with its own scales ('{scaled}'), which cannot be baked into; load"
            " the checkpoint in fp16, bf16 or fp32"
        )
    return {key: _tensor(key, parts) for key, parts in patcher.get_key_patches(prefix).items()}


def _tensor(key: str, parts: Sequence[Any]) -> StoredTensor:
    """A weight as `ModelPatcher.get_key_patches` lists it: (weight, conversion), then its patches."""
    (weight, convert), *patches = parts
    if not patches:
        return StoredTensor(tuple(weight.shape), weight.dtype, partial(_plain, weight, convert))
    return StoredTensor(tuple(weight.shape), torch.float32, partial(_patched, key, weight, convert, patches))


def _plain(weight: Tensor, convert: Any) -> Tensor:
    return convert(weight.to("cpu", copy=True), inplace=True)


def _patched(key: str, weight: Tensor, convert: Any, patches: list[Any]) -> Tensor:
    """Merged in float32 on the CPU, whatever the weight is kept in."""
    value = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
    return comfy.lora.calculate_weight(patches, value, key)
