"""What is minimised: the Diff2Flow loss (Algorithm 1), naive flow matching or the diffusion loss, on the same draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..alignment import Alignment, NaiveFlow, NoiseSchedule
from . import times
from .port import Backbone
from .reflow_settings import ReflowSettings
from .transport import PAIRINGS

OBJECTIVES = ("diff2flow", "flow_matching", "diffusion")
T_RANGES = ("native", "full", "clamped")
WEIGHTINGS = ("clamped", "velocity", "eps")
LOSSES = ("l2", "huber", "pseudo_huber")
SWITCH = ("auto", "on", "off")

MAX_GAIN = 4.0
""" "clamped" limits how much the network's error may be amplified on its way to the velocity. An eps network's is
amplified by 1/t, up to 15.6 at t_min and 244 in the squared loss: one noisy item can own the batch's gradient. 4 leaves
the flow matching loss as it is for t >= 1/4; a v network (gain 1 to 1.41) is never touched."""

DELTA = 0.00054
"""Lee, Lin, Fanti (2024) take sqrt(|e|² + c²) - c with c = 0.00054 d and |e|² a sum over the d values; here |e|² is
their mean, and delta = c/sqrt(d)."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What to minimise.

    Args:
        name: "diff2flow" (Algorithm 1), "flow_matching" (naive: the network's output is the velocity, at tau = t·T) or
            "diffusion" (the network's own eps or v loss).
        t_range: "native" draws t where the network was trained, [t_min, t_max]; "full" draws from all of [0, 1], after
            which sampling starts at t = 0 (DESIGN trap 4); "clamped" draws from [0, 1] and moves what lies outside to
            t_min or t_max, so that the time where sampling starts is trained often. diff2flow only; flow_matching is
            always full.
        weighting: of the squared velocity error over t. "velocity" (flow matching as it is), "clamped" (the same, its
            amplification limited to MAX_GAIN) or "eps" (the error of the noise, t² times that of the velocity).
            diff2flow only.
        time_distribution: of `times.DISTRIBUTIONS`, over the trained range of t (diffusion: over tau).
        logit_mean, logit_spread: of the time distribution "logit_normal".
        loss: "l2": |e|²; "huber": |e|²/2 up to `delta`, then linear; "pseudo_huber": sqrt(|e|² + delta²) - delta with
            |e|² the mean over an item. e is the weighted error of the velocity (diffusion: of the prediction).
        delta: of the two Huber losses, at least 0; 0 is `DELTA` times the root of the number of latent values.
        zero_terminal_snr: "on" trains on the schedule rescaled to zero terminal SNR; "off" on the plain one; "auto" on
            the model's own. v prediction only.
        caption_dropout: share of items trained with the empty caption, [0, 1]; keeps CFG working.
        reflow: of reflow: which lines are learned, see `lines`. Windows and consistency are for diff2flow only.
        pairing: "independent" trains each item with the noise that was drawn for it; "optimal_transport" gives the
            noises of one network call to its items so that the sum of squared distances is least, see `transport`. Not
            for diffusion, nor for data that has its own noise.

    Raises:
        ValueError: an unknown choice, a number out of range, or windows or a pairing with another objective.
    """

    name: str = "diff2flow"
    t_range: str = "native"
    weighting: str = "clamped"
    time_distribution: str = "uniform"
    logit_mean: float = 0.0
    logit_spread: float = 1.0
    loss: str = "l2"
    delta: float = 0.1
    zero_terminal_snr: str = "auto"
    caption_dropout: float = 0.0
    reflow: ReflowSettings = field(default_factory=ReflowSettings)
    pairing: str = PAIRINGS[0]

    def __post_init__(self) -> None:
        choices = {
            "name": OBJECTIVES,
            "t_range": T_RANGES,
            "weighting": WEIGHTINGS,
            "time_distribution": times.DISTRIBUTIONS,
            "loss": LOSSES,
            "zero_terminal_snr": SWITCH,
            "pairing": PAIRINGS,
        }
        for choice, allowed in choices.items():
            if getattr(self, choice) not in allowed:
                shown = "objective" if choice == "name" else choice
                raise ValueError(f"{shown} must be one of {', '.join(allowed)}, not {getattr(self, choice)!r}")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must be from 0 to 1, not {self.caption_dropout}; 0.1 is usual")
        if not 0.0 <= self.delta < float("inf"):
            raise ValueError(f"delta must be at least 0, not {self.delta}; 0.1 is usual, 0 goes by the latent's size")
        if not 0.0 < self.logit_spread < float("inf") or not abs(self.logit_mean) < float("inf"):
            raise ValueError(f"logit_spread must be above 0, not {self.logit_spread}, and logit_mean finite")
        if self.name != "diff2flow" and (self.reflow.windows or self.reflow.consistency):
            raise ValueError(
                f"objective '{self.name}' cannot be combined with windows or consistency: choose objective 'diff2flow',"
                " or a recipe without them"
            )
        if self.name == "diffusion" and self.transports:
            raise ValueError(
                f"objective '{self.name}' cannot be combined with pairing '{self.pairing}': its loss is that of a"
                " diffusion from independent noise; choose objective 'diff2flow', or pairing 'independent'"
            )

    @property
    def transports(self) -> bool:
        """Whether noises are paired with items by optimal transport."""
        return self.pairing == "optimal_transport"


class Objective:
    """A loss on one network's flow.

    Args:
        settings: which.
        schedule, prediction: the network's.

    Attributes:
        alignment: between the network and its flow: `Alignment`, or `NaiveFlow` for flow_matching.

    Raises:
        ValueError: zero terminal SNR with an eps network.
    """

    def __init__(self, settings: ObjectiveSettings, schedule: NoiseSchedule, prediction: str) -> None:
        self.settings = settings
        self.schedule = schedule.switched(settings.zero_terminal_snr)
        self.alignment: Alignment | NaiveFlow = (
            NaiveFlow(self.schedule)
            if settings.name == "flow_matching"
            else Alignment(self.schedule, _checked_prediction(prediction, self.schedule))
        )
        self._error = _prediction_error if settings.name == "diffusion" else _velocity_error

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
        """Flow times (B,) from uniform draws (B,) in [0, 1), distributed over `t_span`; diffusion: over integer tau."""
        settings = self.settings
        t = times.drawn(settings.time_distribution, uniform, settings.logit_mean, settings.logit_spread)
        if settings.name == "diffusion":
            steps = self.schedule.steps
            return self.alignment.flow_time(((1.0 - t) * steps).floor().clamp(0, steps - 1))
        first, last = self.t_span
        return t.clamp(first, last) if settings.t_range == "clamped" else first + t * (last - first)

    def loss(
        self,
        backbone: Backbone,
        x_data: Tensor,
        x_noise: Tensor,
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Loss of each item (B,), float32, from one call of the network.

        Args:
            x_data, x_noise: (B, *dims) in the network's scale.
            t: (B,) flow times.
            conditioning: what the network takes beside x and tau.
            mask: weight of each latent pixel's squared error, broadcast to (B, *dims), [0, 1].
        """
        error = self._error(self.alignment, backbone, x_data, x_noise, t, conditioning)
        error = error * over(self.weight(t).sqrt(), error)
        delta = self.settings.delta or DELTA * math.sqrt(x_data[0].numel())
        return _LOSSES[self.settings.loss](error if mask is None else error * mask.sqrt(), delta)

    def velocity(self, backbone: Backbone, x_flow: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """velocity (B, *dims), float32, at x_flow (B, *dims), t (B,), from one call of the network."""
        return _velocity(self.alignment, backbone, x_flow, t, conditioning)

    def flow_matching_error(
        self, backbone: Backbone, x_data: Tensor, x_noise: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """|x_data - x_noise - velocity|² of each item (B,), the mean over its pixels, whatever is trained."""
        error = _velocity_error(self.alignment, backbone, x_data, x_noise, t, conditioning)
        return _mean_square(error)

    def weight(self, t: Tensor) -> Tensor:
        """Weight (B,) of the squared error at t (B,)."""
        if self.settings.name != "diff2flow" or self.settings.weighting == "velocity":
            return torch.ones_like(t)
        if self.settings.weighting == "eps":
            return t.clamp(min=self.alignment.t_range[0]) ** 2
        return (MAX_GAIN / self._gain(t)).clamp(max=1.0) ** 2

    def _gain(self, t: Tensor) -> Tensor:
        """|d velocity / d output| (B,): the velocity is affine in the output."""
        ones = torch.ones(len(t), 1, device=t.device)
        return self.alignment.velocity(ones, torch.zeros_like(ones), t).abs().squeeze(1)


def _velocity_error(
    alignment: Alignment | NaiveFlow,
    backbone: Backbone,
    x_data: Tensor,
    x_noise: Tensor,
    t: Tensor,
    conditioning: Mapping[str, Tensor],
) -> Tensor:
    """x_data - x_noise - velocity, the network called at f_x⁻¹(x_flow), f_t⁻¹(t) (Algorithm 1)."""
    return x_data - x_noise - _velocity(alignment, backbone, interpolate(x_data, x_noise, t), t, conditioning)


def _velocity(
    alignment: Alignment | NaiveFlow, backbone: Backbone, x_flow: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    output = backbone(alignment.to_diffusion(x_flow, t), alignment.timestep(t), conditioning).float()
    return alignment.velocity(output, x_flow, t)


def _prediction_error(
    alignment: Alignment | NaiveFlow,
    backbone: Backbone,
    x_data: Tensor,
    x_noise: Tensor,
    t: Tensor,
    conditioning: Mapping[str, Tensor],
) -> Tensor:
    """target - output, target what the network predicts: x_noise, alpha x_noise - sigma x_data, or x_data."""
    x_diff = alignment.to_diffusion(interpolate(x_data, x_noise, t), t)
    output = backbone(x_diff, alignment.timestep(t), conditioning).float()
    alpha, sigma = (over(c.to(x_data.dtype), x_data) for c in alignment.coefficients(t))
    targets = {"eps": x_noise, "v": alpha * x_noise - sigma * x_data, "x0": x_data}
    return targets[alignment.prediction] - output


def _huber(error: Tensor, delta: float) -> Tensor:
    size = error.abs()
    return torch.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).flatten(1).mean(dim=1)


def _pseudo_huber(error: Tensor, delta: float) -> Tensor:
    return torch.sqrt(_mean_square(error) + delta**2) - delta


_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l2": lambda error, delta: _mean_square(error),
    "huber": _huber,
    "pseudo_huber": _pseudo_huber,
}


def _checked_prediction(prediction: str, schedule: NoiseSchedule) -> str:
    if prediction == "eps" and schedule.is_zero_terminal_snr:
        raise ValueError(
            "zero_terminal_snr cannot be combined with an eps model (its velocity at the start is infinite): set it to"
            " 'off', or train a v-prediction checkpoint"
        )
    return prediction


def interpolate(x_data: Tensor, x_noise: Tensor, t: Tensor) -> Tensor:
    """x_flow = t x_data + (1-t) x_noise (Eq. 9)."""
    t = over(t, x_data)
    return t * x_data + (1.0 - t) * x_noise


def over(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def _mean_square(error: Tensor) -> Tensor:
    return (error**2).flatten(1).mean(dim=1)
