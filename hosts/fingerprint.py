"""Cheap digests of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLES = 16


def digest(*groups: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and up to 16 evenly spaced values of every tensor, in float32.

    Two sets of weights that differ almost everywhere, as any training makes them, differ here; the cost is a few
    values a tensor.
    """
    sha = hashlib.sha256()
    for group in groups:
        for name in sorted(group):
            sha.update(f"{name}{tuple(group[name].shape)}".encode())
            sha.update(_sampled(group[name]))
    return sha.hexdigest()


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > _SAMPLES:
        flat = flat[torch.arange(_SAMPLES, device=flat.device) * (flat.numel() - 1) // (_SAMPLES - 1)]
    return flat.float().cpu().numpy().tobytes()
