"""Which straight lines the velocity is learned on, given as their ends at t = 1 and t = 0.

The flow matching loss takes a line from x_noise to x_data and asks for its direction. Everything that reflow does is
another line: that of a pair, of the teacher's path across a window, or to what the network itself predicts later on.
A line that begins later than at t = 0 or ends before t = 1 is prolonged to both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..samplers.parameterization import FlowParameterization
from .objective import Objective, interpolate, over
from .reflow_settings import ReflowSettings

Velocity = Callable[[Tensor, Tensor], Tensor]
"""velocity (B, *dims) at x_flow (B, *dims), t (B,)."""


class Line(NamedTuple):
    """A straight line for each item: x_flow(t) = t x_data + (1 - t) x_noise, both (B, *dims)."""

    x_data: Tensor
    x_noise: Tensor

    def at(self, t: Tensor) -> Tensor:
        """x_flow (B, *dims) at t (B,)."""
        return interpolate(self.x_data, self.x_noise, t)


def line_through(x: Tensor, t: Tensor, velocity: Tensor) -> Line:
    """The line through x (B, *dims) at t (B,) with that velocity (B, *dims)."""
    return Line(x + over(1.0 - t, x) * velocity, x - over(t, x) * velocity)


class Lines:
    """The lines of a run.

    Args:
        objective: of the run.
        steps: of the run.
    """

    def __init__(self, objective: Objective, steps: int) -> None:
        self._settings: ReflowSettings = objective.settings.reflow
        self._flow = FlowParameterization(objective.alignment, objective.start)
        self._last = objective.t_span[1]
        self._consistent_from = steps - round(self._settings.consistency * steps)

    def of_pairs(self, x_data: Tensor, x_noise: Tensor) -> Line:
        """From where sampling starts with x_noise to x_data: x_start = n(t_start) x_noise at t_start, x_data at 1.

        A model that starts at t = 0 has x_noise itself there; a base model starts at t_min (DESIGN trap 4), and one
        step from there must reach x_data.
        """
        t = self._flow.t_start
        return Line(x_data, (self._start(x_noise) - t * x_data) / (1.0 - t))

    def across_window(self, teacher: Velocity, x_data: Tensor, x_noise: Tensor, t: Tensor) -> Line:
        """The chord of the teacher's path across the window that t lies in (PeRFlow, Yan et al. 2024).

        The windows are equal parts of [t_start, 1]. The path begins on the line between data and noise, the first one
        where sampling starts, and is followed by Euler steps.

        Args:
            teacher: its velocity, guided.
            x_data, x_noise: (B, *dims).
            t: (B,).
        """
        settings, start = self._settings, self._flow.t_start
        length = (1.0 - start) / settings.windows
        number = ((t - start) / length).floor().clamp(0, settings.windows - 1)
        begin = start + number * length
        first = torch.where(over(number == 0, x_data), self._start(x_noise), interpolate(x_data, x_noise, begin))
        x, part = first, length / settings.window_steps
        for step in range(settings.window_steps):
            x = x + part * teacher(x, begin + step * part)
        return line_through(first, begin, (x - first) / length)

    def is_consistent(self, step: int) -> bool:
        """Whether a step, 0 being the first, belongs to the consistency phase."""
        return step >= self._consistent_from

    def to_own_prediction(self, network: Velocity, line: Line, t: Tensor) -> Line:
        """From the line's point at t to the data that the network predicts from its point one step later.

        x_data_hat(s) = x_flow(s) + (1 - s) velocity, s = t + (1 - t_start)/consistency_steps; where s is beyond the
        times that the network knows, the line's own x_data (consistency models, Song et al. 2023; on the lines of a
        rectified flow as in Rectified Diffusion, Wang et al. 2024). No gradient goes through the prediction.

        Args:
            network: the velocity of the network in training.
            line: of the pairs.
            t: (B,).
        """
        later = t + (1.0 - self._flow.t_start) / self._settings.consistency_steps
        reached = over(later >= self._last, line.x_data)
        s = later.clamp(max=self._last)
        with torch.no_grad():
            x = line.at(s)
            predicted = line_through(x, s, network(x, s)).x_data
        here = line.at(t)
        velocity = (predicted - here) / over((1.0 - t).clamp(min=1e-3), here)
        own = line_through(here, t, velocity)
        return Line(*(torch.where(reached, known, found) for known, found in zip(line, own, strict=True)))

    def _start(self, x_noise: Tensor) -> Tensor:
        """x_flow where sampling starts."""
        sigma = torch.full((), self._flow.sigma_max, device=x_noise.device, dtype=x_noise.dtype)
        return self._flow.noisy(sigma, x_noise, torch.zeros_like(x_noise), at_start=True)
