"""Which dtype a number is computed in: times in float64 where the device has it, states in float32 at least.

Nothing else in the project asks for float64: what a device without it cannot do is decided here.
"""

import torch
from torch import Tensor

# Apple's MPS, many Intel GPUs and DirectML have no float64 at all.
DEVICES_WITHOUT_FLOAT64 = frozenset({"mps", "xpu", "privateuseone"})

FLOAT64 = torch.float64
"""For what is made on the CPU, and for the names of dtypes in files."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of times, tables and coefficients on `device`: float64, or float32 where there is none."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else FLOAT64


def wide(x: Tensor) -> Tensor:
    """Return x in the wide dtype of its device: for times and coefficients, which stay where they are."""
    return x.to(wide_dtype(x.device))


def exact(x: Tensor) -> Tensor:
    """Return x in float64, on the CPU where its device has none: for what is measured, whatever it costs."""
    return (x.cpu() if x.device.type in DEVICES_WITHOUT_FLOAT64 else x).to(FLOAT64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a state of `dtype` is computed in: itself, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)
