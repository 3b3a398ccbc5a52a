"""Tensors on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the host does not wait for what the device is still busy with.

    CUDA copies beside the host from pinned memory alone, through which the tensor goes; one that is there stays itself.
    """
    if device.type != "cuda" or tensor.device.type != "cpu" or tensor.requires_grad:  # pinning has no gradient
        return tensor.to(device)
    try:
        pinned = tensor.contiguous().pin_memory()
    except (RuntimeError, AssertionError):  # the system pins no more, or these are an estimate's, which have no memory
        return tensor.to(device)
    return pinned.to(device, non_blocking=True)
