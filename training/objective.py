"""What is minimised: the Diff2Flow loss (Algorithm 1) and, for comparison, the diffusion loss on the same data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..alignment import Alignment
from .port import Backbone

T_RANGES = ("native", "full")
WEIGHTINGS = ("clamped", "velocity", "eps")

MAX_GAIN = 4.0
""" "clamped" limits how much the network's error may be amplified on its way to the velocity. An eps network's is
amplified by 1/t, up to 15.6 at t_min and 244 in the squared loss: one noisy item can own the batch's gradient. 4 leaves
the flow matching loss as it is for t >= 1/4; a v network (gain 1 to 1.41) is never touched."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What to minimise.

    Args:
        name: "diff2flow" or "diffusion".
        t_range: "native" draws t where the network was trained, [t_min, t_max]; "full" draws from all of [0, 1], after
            which sampling starts at t = 0 (DESIGN trap 4). diff2flow only.
        weighting: "velocity" (flow matching as it is), "clamped" (the same, its amplification limited to MAX_GAIN) or
            "eps" (the error of the noise, t² times that of the velocity). diff2flow only.

    Raises:
        ValueError: an unknown choice.
    """

    name: str = "diff2flow"
    t_range: str = "native"
    weighting: str = "clamped"

    def __post_init__(self) -> None:
        choices = {"name": tuple(_LOSSES), "t_range": T_RANGES, "weighting": WEIGHTINGS}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                shown = "objective" if field == "name" else field
                raise ValueError(f"{shown} must be one of {', '.join(allowed)}, not {getattr(self, field)!r}")


class Objective:
    """A loss on one network's flow.

    Args:
        settings: which.
        alignment: of the network's schedule and prediction.
    """

    def __init__(self, settings: ObjectiveSettings, alignment: Alignment) -> None:
        self.settings, self.alignment = settings, alignment
        self._loss = _LOSSES[settings.name]

    @property
    def t_span(self) -> tuple[float, float]:
        """The flow times that are trained."""
        full = self.settings.name == "diff2flow" and self.settings.t_range == "full"
        return (0.0, 1.0) if full else self.alignment.t_range

    @property
    def start(self) -> str:
        """Where sampling of the trained network begins: "noise" (t = 0) or "terminal" (t_min)."""
        return "noise" if self.t_span[0] == 0.0 else "terminal"

    def times(self, uniform: Tensor) -> Tensor:
        """Flow times (B,) from uniform draws (B,) in [0, 1): uniform in `t_span`; diffusion: uniform in integer tau."""
        if self.settings.name == "diffusion":
            steps = self.alignment.schedule.steps
            return self.alignment.flow_time((uniform * steps).floor().clamp(max=steps - 1))
        first, last = self.t_span
        return first + uniform * (last - first)

    def loss(
        self, backbone: Backbone, x_data: Tensor, x_noise: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Loss of each item (B,), float32, from one call of the network.

        Args:
            x_data, x_noise: (B, *dims) in the network's scale.
            t: (B,) flow times.
            conditioning: what the network takes beside x and tau.
        """
        return self._loss(self, backbone, x_data, x_noise, t, conditioning)

    def weight(self, t: Tensor) -> Tensor:
        """Weight (B,) of the squared velocity error at t (B,)."""
        if self.settings.weighting == "velocity":
            return torch.ones_like(t)
        if self.settings.weighting == "eps":
            return t.clamp(min=self.alignment.t_range[0]) ** 2
        return (MAX_GAIN / self._gain(t)).clamp(max=1.0) ** 2

    def _gain(self, t: Tensor) -> Tensor:
        """|d velocity / d output| (B,): the velocity is affine in the output."""
        ones = torch.ones(len(t), 1, device=t.device)
        return self.alignment.velocity(ones, torch.zeros_like(ones), t).abs().squeeze(1)


def _diff2flow_loss(
    objective: Objective,
    backbone: Backbone,
    x_data: Tensor,
    x_noise: Tensor,
    t: Tensor,
    conditioning: Mapping[str, Tensor],
) -> Tensor:
    """weight(t) |x_data - x_noise - velocity|² with the network called at f_x⁻¹(x_flow), f_t⁻¹(t) (Algorithm 1)."""
    alignment = objective.alignment
    x_flow = _interpolate(x_data, x_noise, t)
    output = backbone(alignment.to_diffusion(x_flow, t), alignment.timestep(t), conditioning).float()
    velocity = alignment.velocity(output, x_flow, t)
    return objective.weight(t) * _mean_square(x_data - x_noise - velocity)


def _diffusion_loss(
    objective: Objective,
    backbone: Backbone,
    x_data: Tensor,
    x_noise: Tensor,
    t: Tensor,
    conditioning: Mapping[str, Tensor],
) -> Tensor:
    """|target - output|², target what the network predicts: x_noise, alpha x_noise - sigma x_data, or x_data."""
    alignment = objective.alignment
    x_diff = alignment.to_diffusion(_interpolate(x_data, x_noise, t), t)
    output = backbone(x_diff, alignment.timestep(t), conditioning).float()
    alpha, sigma = (_over(c.to(x_data.dtype), x_data) for c in alignment.coefficients(t))
    targets = {"eps": x_noise, "v": alpha * x_noise - sigma * x_data, "x0": x_data}
    return _mean_square(targets[alignment.prediction] - output)


_LOSSES: dict[str, Callable[..., Tensor]] = {"diff2flow": _diff2flow_loss, "diffusion": _diffusion_loss}
OBJECTIVES = tuple(_LOSSES)


def _interpolate(x_data: Tensor, x_noise: Tensor, t: Tensor) -> Tensor:
    """x_flow = t x_data + (1-t) x_noise (Eq. 9)."""
    t = _over(t, x_data)
    return t * x_data + (1.0 - t) * x_noise


def _over(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def _mean_square(error: Tensor) -> Tensor:
    return (error**2).flatten(1).mean(dim=1)
