"""Which dtype a number is computed in: times in float64 where the device has it, states in float32 at least."""

import torch

# Apple's MPS, many Intel GPUs and DirectML have no float64 at all.
DEVICES_WITHOUT_FLOAT64 = frozenset({"mps", "xpu", "privateuseone"})


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of times, tables and coefficients on `device`: float64, or float32 where there is none."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a state of `dtype` is computed in: itself, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)
