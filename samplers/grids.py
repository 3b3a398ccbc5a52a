"""Time grids: where between noise (t = 0) and data (t = 1) a solver takes its steps."""

import math

import torch
from torch import Tensor

from ..alignment.precision import FLOAT64

PUBLISHED_STEEPNESS = 4.0
"""a of the U-shaped density of Lee, Lin, Fanti 2024 ("Improving the training of rectified flows", arXiv 2405.20320,
Sec. 4)."""


def uniform(u: Tensor) -> Tensor:
    """Return u: steps of equal length."""
    return u


def cosine(u: Tensor) -> Tensor:
    """Return 1 - cos(pi/2·u): short steps near noise, long ones near data. u: any shape, in [0, 1]."""
    return 1 - torch.cos(math.pi / 2 * u)


def u_shaped(u: Tensor, steepness: float = PUBLISHED_STEEPNESS) -> Tensor:
    """Return the quantile function of the U-shaped density p(t) ~ e^{a t} + e^{a (1-t)}: dense at both ends.

    t = 1/2 + asinh((2u - 1)·sinh(a/2))/a   (symmetric about t = 1/2; published with a = 4)

    On uniform random u it draws training times from that density; on even u it is a time grid. For a = 4, 32 % of the
    times lie in the middle half, for a = 8 13 %.

    Args:
        u: any shape, in [0, 1].
        steepness: a, above 0.
    """
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(steepness / 2)) / steepness


SHAPES = {"uniform": uniform, "cosine": cosine, "u_shaped": u_shaped}


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return t moved towards noise by SD3's time shift, t/(t + shift·(1-t)).

    It is sigma' = shift·sigma/(1 + (shift-1)·sigma) on sigma = 1 - t (arXiv 2403.03206, Eq. 23). Shift 1 changes
    nothing; a larger one spends more steps near noise; shift a after shift b is shift a·b.

    Args:
        t: any shape, in [0, 1].
        shift: above 0.

    Raises:
        ValueError: shift is not a finite number above 0.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a finite number above 0, got {shift}")
    return t / (t + shift * (1 - t))


def time_grid(steps: int, shape: str = "uniform", start: float = 0.0, end: float = 1.0, shift: float = 1.0) -> Tensor:
    """Return the steps + 1 flow times of a sampling run, increasing, with exact ends.

    t_i = start + (end - start)·shift_time(shape(i/steps), shift)

    Args:
        steps: number of intervals, at least 1.
        shape: "uniform", "cosine" (dense near noise) or "u_shaped" (dense at both ends).
        start, end: flow times, 0 <= start < end <= 1.
        shift: above 0; above 1 moves steps towards noise, whatever the shape.

    Returns:
        (steps + 1,) float64 on the CPU. Flipped, it is a grid for inversion.

    Raises:
        ValueError: an argument out of its range.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if not 0 <= start < end <= 1:
        raise ValueError(f"times must satisfy 0 <= start < end <= 1, got start={start}, end={end}")
    fractions = shift_time(SHAPES[shape](torch.linspace(0, 1, steps + 1, dtype=FLOAT64)), shift)
    times = start + (end - start) * fractions
    times[0], times[-1] = start, end
    return times
