"""Integrate any velocity over any time grid, by any of the solvers."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..alignment.precision import state_dtype, wide_dtype
from .steps import BEFORE_END, SOLVERS, Field, NonFiniteStateError, Previous, Step, StepFunction

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]

NEAR_POLE = 1 / 8
"""A step that ends nearer to a pole than this part of its length asks for no velocity at its end."""
EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1}


class Counted:
    """A velocity that counts its evaluations (one per call, whatever the batch).

    Attributes:
        evaluations: calls so far.
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        return self.velocity(x, t)


def evaluations(solver: str, steps: int) -> int:
    """Return how many velocity evaluations a solver of fixed cost makes in `steps` steps that end at no pole.

    Args:
        solver: "euler", "midpoint", "heun", "rk4" or "ab2".
        steps: number of steps, at least 1.

    Raises:
        ValueError: unknown solver; "dopri5", whose cost depends on the velocity (count it with `Counted`); steps < 1.
    """
    if solver not in EVALUATIONS_PER_STEP:
        raise ValueError(f"solver must be one of {', '.join(EVALUATIONS_PER_STEP)}, got {solver!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return EVALUATIONS_PER_STEP[solver] * steps + (1 if solver == "ab2" else 0)


def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    solver: str = "euler",
    callback: Callback | None = None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    pole: float | None = None,
) -> Tensor:
    """Solve dx/dt = velocity(x, t) from times[0] to times[-1] and return the last state.

    Args:
        velocity: called with the state (B, *dims) and t, a () tensor on x's device (float64 where the device has it);
            returns the velocity in the state's shape.
        x: (B, *dims), the state at times[0]. The state is kept in x's dtype, float32 at least.
        times: (N + 1,), strictly increasing (noise to data) or strictly decreasing (inversion).
        solver: "euler", "midpoint", "heun", "rk4", "ab2" or "dopri5" (needs torchdiffeq).
        callback: called after each of the N steps with (step index from 0, t_next, x_next, slope). t_next is a float;
            slope is the step's mean velocity, x_next = x + h·slope, so x_next + (1 - t_next)·slope is an estimate of
            x_data. What it raises ends the integration.
        rtol, atol: relative and absolute tolerance of dopri5 in each step; the other solvers do not use them.
        pole: a time where the velocity has no value, as (x_data_hat - x)/(1 - t) has none at t = 1, which magnifies
            near it whatever x_data_hat is off by. A step that ends there, or comes nearer to it than `NEAR_POLE` of its
            length, asks for velocities before its end only: heun makes it by the midpoint method, rk4 by a method of
            order 3 with one evaluation less, dopri5 the last eighth of it so. The order of the walk stays.

    Returns:
        (B, *dims) in x's dtype. Gradients are recorded as usual: wrap the call in `torch.no_grad()` for sampling.

    Raises:
        ValueError: an argument, or the shape of a velocity, is wrong.
        NonFiniteStateError: a state is NaN or infinite. It names the first step that was; it is raised at the end
            (for dopri5 at once), so that no step waits for the device.
        RuntimeError: dopri5 cannot meet its tolerances.
    """
    _check_state(x)
    moments = _check_times(times)
    take_step, take_step_to_pole = (_step_function(table, solver, rtol, atol) for table in (SOLVERS, BEFORE_END))
    state = x.to(state_dtype(x.dtype))
    field = _checked(velocity)
    on_device = torch.tensor(moments, dtype=wide_dtype(x.device), device=x.device)
    finite, previous, steps = [state.isfinite().all()], None, len(moments) - 1
    for index in range(steps):
        step = Step(index, steps, on_device[index], on_device[index + 1], moments[index + 1] - moments[index])
        to_pole = pole is not None and abs(pole - moments[index + 1]) < NEAR_POLE * abs(step.h)
        first_velocity, slope = (take_step_to_pole if to_pole else take_step)(field, state, step, previous)
        state = state + step.h * slope
        previous = Previous(first_velocity, step.h)
        finite.append(state.isfinite().all())
        if callback is not None:
            callback(index, moments[index + 1], state, slope)
    _raise_if_not_finite(finite, moments)
    return state.to(x.dtype)


def _step_function(table: Mapping[str, StepFunction], solver: str, rtol: float, atol: float) -> StepFunction:
    if solver not in table:
        raise ValueError(f"solver must be one of {', '.join(table)}, got {solver!r}")
    if solver != "dopri5":
        return table[solver]
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 < tolerance < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {tolerance}")
    return partial(table[solver], rtol=rtol, atol=atol)


def _check_state(x: Tensor) -> None:
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point tensor (B, *dims), got shape {tuple(x.shape)} of {x.dtype}")


def _check_times(times: Tensor) -> list[float]:
    """Return the times as floats: the one transfer from the device, before the first step."""
    times = torch.as_tensor(times)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must have shape (N + 1,) with N >= 1, got {tuple(times.shape)}")
    moments = [float(moment) for moment in times.tolist()]
    gaps = [after - before for before, after in pairwise(moments)]
    if not all(map(math.isfinite, moments)):
        raise ValueError(f"times must be finite, got {moments}")
    if not (all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)):
        raise ValueError(f"times must be strictly increasing or strictly decreasing, got {moments}")
    return moments


def _checked(velocity: Velocity) -> Field:
    """Return the velocity in the state's dtype; a wrong shape, which would broadcast, is an error."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        result = velocity(x, t)
        if result.shape != x.shape:
            raise ValueError(f"the velocity has shape {tuple(result.shape)}, the state {tuple(x.shape)}")
        return result.to(x.dtype)

    return field


def _raise_if_not_finite(finite: list[Tensor], moments: list[float]) -> None:
    """Look at all the flags at once; finite[i] belongs to the state at moments[i]."""
    flags = torch.stack(finite).tolist()
    if not all(flags):
        first = flags.index(False)
        raise NonFiniteStateError(first - 1, len(moments) - 1, moments[first])
