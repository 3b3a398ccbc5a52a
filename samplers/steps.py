"""One step of each ODE solver, as in the textbook (Hairer, Nørsett, Wanner, Solving ODEs I).

A step function gets the field, the state, the step to take and what the step before left; it returns the velocity at
the step's start and the step's slope. The integrator then sets x_next = x + h·slope.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..alignment.precision import wide_dtype

MAX_ADAPTIVE_STEPS = 1000
OPEN_PART = 1 / 8
"""Part of an interval that dopri5 leaves to `ralston3` where the end has no velocity: its error there, of the order of
the fourth power of that part, stays below the tolerances in use."""


class NonFiniteStateError(RuntimeError):
    """The state became NaN or infinite.

    Attributes:
        step: index of the first step that ended so, counted as in the callback; -1 for the initial state.
    """

    def __init__(self, step: int, steps: int, t: float) -> None:
        what = "the initial state is" if step < 0 else f"step {step + 1} of {steps} made the state"
        super().__init__(f"{what} NaN or infinite at t = {t:.6g}")
        self.step = step


class Step(NamedTuple):
    """One interval: its index of `steps`, its two times as () tensors on the state's device, its length h (signed)."""

    index: int
    steps: int
    t: Tensor
    t_next: Tensor
    h: float


class Previous(NamedTuple):
    """What a multistep method remembers of the step before: the velocity at its start and its length."""

    velocity: Tensor
    h: float


Field = Callable[[Tensor, Tensor], Tensor]
StepFunction = Callable[[Field, Tensor, Step, Previous | None], tuple[Tensor, Tensor]]


def euler(field: Field, x: Tensor, step: Step, previous: Previous | None) -> tuple[Tensor, Tensor]:
    """Order 1."""
    k1 = field(x, step.t)
    return k1, k1


def midpoint(field: Field, x: Tensor, step: Step, previous: Previous | None) -> tuple[Tensor, Tensor]:
    """Order 2: the velocity halfway."""
    k1 = field(x, step.t)
    k2 = field(x + step.h / 2 * k1, (step.t + step.t_next) / 2)
    return k1, k2


def heun(field: Field, x: Tensor, step: Step, previous: Previous | None) -> tuple[Tensor, Tensor]:
    """Order 2: the mean of the velocities at both ends."""
    k1 = field(x, step.t)
    k2 = field(x + step.h * k1, step.t_next)
    return k1, (k1 + k2) / 2


def rk4(field: Field, x: Tensor, step: Step, previous: Previous | None) -> tuple[Tensor, Tensor]:
    """Order 4: the classical Runge-Kutta method."""
    middle = (step.t + step.t_next) / 2
    k1 = field(x, step.t)
    k2 = field(x + step.h / 2 * k1, middle)
    k3 = field(x + step.h / 2 * k2, middle)
    k4 = field(x + step.h * k3, step.t_next)
    return k1, (k1 + 2 * k2 + 2 * k3 + k4) / 6


def ralston3(field: Field, x: Tensor, step: Step, previous: Previous | None) -> tuple[Tensor, Tensor]:
    """Order 3, no velocity later than three quarters of the step (Ralston 1962): as one step of a walk of order 4 it
    keeps the order of the walk."""
    k1 = field(x, step.t)
    k2 = field(x + step.h / 2 * k1, (step.t + step.t_next) / 2)
    k3 = field(x + 3 * step.h / 4 * k2, (step.t + 3 * step.t_next) / 4)
    return k1, (2 * k1 + 3 * k2 + 4 * k3) / 9


def ab2(field: Field, x: Tensor, step: Step, previous: Previous | None) -> tuple[Tensor, Tensor]:
    """Order 2: Adams-Bashforth on steps of any length; the first step is Heun's."""
    if previous is None:
        return heun(field, x, step, previous)
    k1 = field(x, step.t)
    half_ratio = step.h / previous.h / 2
    return k1, (1 + half_ratio) * k1 - half_ratio * previous.velocity


def dopri5(
    field: Field, x: Tensor, step: Step, previous: Previous | None, *, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Order 5, adaptive (Dormand-Prince): as many inner steps as the tolerances ask for, the whole interval first.

    The whole batch is one state. No velocity is asked for outside the interval.
    """
    if not x.isfinite().all():  # the step control waits for the device anyway
        raise NonFiniteStateError(step.index - 1, step.steps, float(step.t))
    try:
        x_next = _solve_adaptively(field, x, step, rtol, atol)
    except AssertionError as error:
        if str(error).startswith("non-finite values in state"):
            raise NonFiniteStateError(step.index, step.steps, float(step.t_next)) from error
        if not str(error).startswith(("underflow in dt", "max_num_steps")):
            raise
        raise RuntimeError(
            f"dopri5 cannot meet rtol={rtol}, atol={atol} in step {step.index + 1} of {step.steps}"
            f" (the velocity is too rough or too imprecise, loosen them): {error}"
        ) from error
    slope = (x_next - x) / step.h
    return slope, slope


def ab2_before_end(field: Field, x: Tensor, step: Step, previous: Previous | None) -> tuple[Tensor, Tensor]:
    """As `ab2`; the first step is the midpoint method's."""
    return (midpoint if previous is None else ab2)(field, x, step, previous)


def dopri5_before_end(
    field: Field, x: Tensor, step: Step, previous: Previous | None, *, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """As `dopri5`, but for the last part of the interval (`OPEN_PART`), which is one step of `ralston3`."""
    turn = step.t_next + (step.t - step.t_next) * OPEN_PART
    most = step._replace(t_next=turn, h=step.h * (1 - OPEN_PART))
    rest = step._replace(t=turn, h=step.h * OPEN_PART)
    _, first_slope = dopri5(field, x, most, previous, rtol=rtol, atol=atol)
    _, last_slope = ralston3(field, x + most.h * first_slope, rest, None)
    slope = (1 - OPEN_PART) * first_slope + OPEN_PART * last_slope
    return slope, slope


def _solve_adaptively(field: Field, x: Tensor, step: Step, rtol: float, atol: float) -> Tensor:
    from torchdiffeq import odeint

    def finite_field(t: Tensor, state: Tensor) -> Tensor:
        velocity = field(state, t)
        if not velocity.isfinite().all():
            raise NonFiniteStateError(step.index, step.steps, float(t))
        return velocity

    times = torch.stack([step.t, step.t_next])
    options = {
        "dtype": wide_dtype(x.device),
        "first_step": 2 * abs(step.h),  # cut to the interval by step_t
        "step_t": times[1:],
        "max_num_steps": MAX_ADAPTIVE_STEPS,
    }
    return odeint(finite_field, x, times, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]


SOLVERS: dict[str, StepFunction] = {
    "euler": euler,
    "midpoint": midpoint,
    "heun": heun,
    "rk4": rk4,
    "ab2": ab2,
    "dopri5": dopri5,
}

BEFORE_END: dict[str, StepFunction] = {
    "euler": euler,
    "midpoint": midpoint,
    "heun": midpoint,
    "rk4": ralston3,
    "ab2": ab2_before_end,
    "dopri5": dopri5_before_end,
}
"""How each solver makes a step whose end has no velocity, so that the whole walk keeps the solver's order."""
