"""Flow matching without alignment: the network's output is taken for the velocity. For comparison."""

import torch
from torch import Tensor

from .precision import state_dtype, wide
from .schedule import NoiseSchedule


class NaiveFlow:
    """A diffusion network used as a flow network as it stands, with the interface of `Alignment`.

    It is fed x_flow itself at tau = t·T, and its output is the velocity: what finetuning by flow matching does without
    Diff2Flow (the paper's baseline "FM"). Nothing is aligned, time runs the other way round for it: before training
    its samples are noise.

    Args:
        schedule: of the network; only its number of steps T is used.
    """

    prediction = "velocity"
    t_range = (0.0, 1.0)

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def __repr__(self) -> str:
        return f"NaiveFlow(T={self.schedule.steps})"

    def flow_time(self, tau: Tensor) -> Tensor:
        """Return t = tau/T of tau () or (B,) in [0, T]."""
        return _float(tau) / self.schedule.steps

    def timestep(self, t: Tensor) -> Tensor:
        """Return tau = t·T of t () or (B,) in [0, 1]."""
        return _float(t) * self.schedule.steps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) = (t, 1 - t)."""
        t = wide(torch.as_tensor(t))
        return t, 1.0 - t

    def to_diffusion(self, x_flow: Tensor, t: Tensor) -> Tensor:
        """Return x_flow (B, *dims): the network is fed the flow's own state."""
        return x_flow

    def to_flow(self, x_diff: Tensor, tau: Tensor) -> Tensor:
        """Return x_diff (B, *dims)."""
        return x_diff

    def velocity(self, output: Tensor, x_flow: Tensor, t: Tensor) -> Tensor:
        """Return the output (B, *dims).

        Raises:
            ValueError: output and x_flow differ in shape.
        """
        if output.shape != x_flow.shape:
            raise ValueError(f"output has shape {tuple(output.shape)}, x_flow {tuple(x_flow.shape)}: they must agree")
        return output


def _float(value: Tensor) -> Tensor:
    value = torch.as_tensor(value)
    return value.to(state_dtype(value.dtype)) if value.is_floating_point() else wide(value)
