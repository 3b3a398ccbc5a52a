"""At which flow times a network is trained: distributions over [0, 1], drawn from uniform numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..alignment.precision import exact
from ..samplers.grids import u_shaped

STEEP = 8.0
"""Steepness of "u_shaped", the recipe fast's own: twice that of the published density, which is "u_shaped_lee"."""
MODE_SCALE = 1.29
"""s of the mode distribution as in SD3 (Esser et al. 2024, §3.1)."""


def _uniform(u: Tensor, mean: float, spread: float) -> Tensor:
    return u


def _logit_normal(u: Tensor, mean: float, spread: float) -> Tensor:
    """t = sigmoid(mean + spread·z), z standard normal (SD3, Eq. 19)."""
    inside = exact(u).clamp(1e-7, 1.0 - 1e-7)
    return torch.sigmoid(mean + spread * torch.special.ndtri(inside)).to(u.dtype).to(u.device)


def _u_shaped(u: Tensor, mean: float, spread: float) -> Tensor:
    """Density e^{8t} + e^{8(1-t)}: nearly all at both ends."""
    return u_shaped(u, STEEP)


def _u_shaped_lee(u: Tensor, mean: float, spread: float) -> Tensor:
    """Density e^{4t} + e^{4(1-t)}: more at both ends (Lee, Lin, Fanti 2024, arXiv 2405.20320)."""
    return u_shaped(u)


def _mode(u: Tensor, mean: float, spread: float) -> Tensor:
    """t = u - s (sin²(pi u / 2) - u), which favours the middle for s > 0 (SD3, Eq. 20)."""
    return u - MODE_SCALE * (torch.sin(0.5 * math.pi * u) ** 2 - u)


_DISTRIBUTIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "u_shaped": _u_shaped,
    "mode": _mode,
    "u_shaped_lee": _u_shaped_lee,
}
DISTRIBUTIONS = tuple(_DISTRIBUTIONS)


def drawn(name: str, u: Tensor, mean: float = 0.0, spread: float = 1.0) -> Tensor:
    """Flow times (B,) in [0, 1] of uniform numbers u (B,) in [0, 1), by the inverse of the distribution's integral.

    Args:
        name: of DISTRIBUTIONS.
        u: uniform.
        mean, spread: of logit_normal: mean of the logit (above 0: nearer to the data) and its standard deviation.

    Raises:
        ValueError: another name.
    """
    if name not in _DISTRIBUTIONS:
        raise ValueError(f"time_distribution must be one of {', '.join(DISTRIBUTIONS)}, not {name!r}")
    return _DISTRIBUTIONS[name](u, mean, spread).clamp(0.0, 1.0)
