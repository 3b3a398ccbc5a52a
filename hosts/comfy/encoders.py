"""Text and images through ComfyUI's encoders, and digests that tell models apart.

Whatever lets ComfyUI load a model runs under inference mode here, as it does in ComfyUI's own nodes: weights that were
made under inference mode and are moved without it cannot be viewed or multiplied any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fingerprint import digest

_MODULES = ("cond_stage_model", "first_stage_model")
_SAMPLING = "model_sampling"
_UNSET = ("text_projection.weight", "logit_scale")
"""Weights that SD1 checkpoints do not have: ComfyUI leaves in them what the memory held before."""


@torch.inference_mode()
def encode_text(clip: Any, text: str) -> Any:
    """CONDITIONING of a prompt, as CLIPTextEncode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@torch.inference_mode()
def encode_image(vae: Any, image: Tensor) -> Tensor:
    """Latents of an IMAGE, as VAEEncode makes them."""
    return vae.encode(image[:, :, :, :3])


@torch.inference_mode()
def decode_image(vae: Any, latent: Tensor) -> Tensor:
    """IMAGE of latents, as VAEDecode makes it."""
    image = vae.decode(latent)
    return image.reshape(-1, *image.shape[-3:])


def fingerprint(thing: Any) -> str:
    """Digest of a MODEL, CLIP or VAE from samples of its weights and patches."""
    patcher = getattr(thing, "patcher", thing)
    return digest(_weights(thing, patcher), _patches(patcher))


def _weights(thing: Any, patcher: Any) -> dict[str, Tensor]:
    module = next((getattr(thing, name) for name in _MODULES if hasattr(thing, name)), None) or patcher.model
    weights = {**module.state_dict(), **_unpatched(patcher)}
    own = {name: weights[name] for name in weights if not name.startswith(f"{_SAMPLING}.")}
    return {name: weight for name, weight in {**own, **_sampling(patcher)}.items() if not name.endswith(_UNSET)}


def _sampling(patcher: Any) -> dict[str, Tensor]:
    """Tables of a MODEL's own sampling: in the network that clones share, that of the clone sampled last may stand."""
    if not hasattr(patcher.model, _SAMPLING):
        return {}
    sampling = patcher.get_model_object(_SAMPLING)
    tables = {**sampling.state_dict(), "sigmas": sampling.sigmas}  # those of a chosen flow are no buffer
    return {f"{_SAMPLING}.{name}": table for name, table in tables.items()}


def _unpatched(patcher: Any) -> dict[str, Tensor]:
    """The weights that ComfyUI put aside when it merged patches in: whether a model is loaded makes no difference."""
    aside = {key: getattr(entry, "weight", entry) for key, entry in getattr(patcher, "backup", {}).items()}
    return {key: weight for key, weight in aside.items() if isinstance(weight, Tensor)}


def _patches(patcher: Any) -> dict[str, Tensor]:
    """Tensors of the patches by key and position, strengths in the names."""
    found = {}
    for key, patches in getattr(patcher, "patches", {}).items():
        for i, patch in enumerate(patches):
            value = getattr(patch[1], "weights", patch[1])
            tensors = [v for v in _flat(value) if isinstance(v, Tensor)]
            found.update({f"{key}:{i}:{j}:{patch[0]}:{patch[2]}": v for j, v in enumerate(tensors)})
    return found


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _flat(part)]
    return [value]
