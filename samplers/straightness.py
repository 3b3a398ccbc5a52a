"""How straight the paths of a flow are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..alignment.precision import exact
from .denoiser import Denoiser, FlowSampler, Report, flow_times


@dataclass(frozen=True)
class Straightness:
    """What was measured along paths of N Euler steps.

    S(t) = E|(x_data - x_noise) - velocity(x_flow(t), t)|², the mean over items and their values; x_data - x_noise is
    the velocity of the chord, (x(1) - x(t_start))/(1 - t_start) for a path that begins later than at t = 0 (Liu, Gong,
    Liu 2022, §2.2, here of a single path and not squared over the batch).

    Args:
        times: t at the beginning of each step (N,), float64.
        lengths: of the steps (N,), float64.
        bends: S(t) there (N,), float64; 0 is perfectly straight.
        speed: E|x_data - x_noise|² of the chords.
    """

    times: Tensor
    lengths: Tensor
    bends: Tensor
    speed: float

    @property
    def mean(self) -> float:
        """The mean of S(t) over the path, at least 0."""
        return float((self.bends * self.lengths).sum() / self.lengths.sum())

    @property
    def relative(self) -> float:
        """That as a part of E|x_data - x_noise|²; 0 where nothing moves."""
        return self.mean / self.speed if self.speed else 0.0


def straightness(velocities: Tensor, times: Tensor, lengths: Tensor) -> Straightness:
    """The straightness of paths that were walked by Euler steps.

    Args:
        velocities: at the beginning of each step (N, B, *dims).
        times, lengths: (N,), increasing and above 0.

    Raises:
        ValueError: no step, or shapes that do not fit.
    """
    if velocities.ndim < 2 or not len(velocities) == len(times) == len(lengths) > 0:
        raise ValueError(
            f"velocities must be (N, B, *dims) and times and lengths (N,), N at least 1, not {tuple(velocities.shape)},"
            f" {tuple(times.shape)}, {tuple(lengths.shape)}"
        )
    lengths = exact(lengths)
    over = (-1, *[1] * (velocities.ndim - 1))
    chord = (velocities * lengths.reshape(over).to(velocities)).sum(dim=0) / lengths.sum().to(velocities)
    bends = torch.stack([exact(chord - velocity).square().mean() for velocity in velocities])
    return Straightness(exact(times), lengths, bends, float(exact(chord).square().mean()))


class PathMeter:
    """A k-diffusion style sampler of Euler steps in flow time that measures on its way.

    Velocities wait on the CPU for the end of the path, since the chord is only known then.

    Args:
        speaks_flow: as of `FlowSampler`.

    Attributes:
        found: of the last path.
    """

    __name__ = "diff2flow_straightness"
    found: Straightness

    def __init__(self, speaks_flow: Callable[[Denoiser], bool] = lambda denoiser: True) -> None:
        self._speaks_flow = speaks_flow

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Report | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """The state at sigmas[-1]; arguments as of `denoiser.FlowSampler`."""
        velocities: list[Tensor] = []

        def keep(step: int, t: float, x: Tensor, velocity: Tensor) -> None:
            velocities.append(velocity.float().cpu())

        euler = FlowSampler("euler", 0.0, 0.0, self._speaks_flow, keep)
        end = euler(denoiser, x, sigmas, extra_args, callback)
        times = flow_times(sigmas, self._speaks_flow(denoiser))
        self.found = straightness(torch.stack(velocities), times[:-1], times.diff())
        return end
