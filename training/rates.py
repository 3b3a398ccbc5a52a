"""The learning rate over a run, a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

FINAL_SHARE = 0.01
"""Where the exponential decay ends: the reference's (Marigold's IterExponential, which Diff2Flow's trainer uses)."""

_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: FINAL_SHARE**done,
}
SCHEDULES = tuple(_DECAYS)


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """Factor in (0, 1] of the learning rate at a step.

    Args:
        schedule: of SCHEDULES. "exponential" ends at FINAL_SHARE, "linear" and "cosine" just above 0.
        step: 0, 1, ..., steps - 1.
        steps: of the run.
        warmup_steps: steps in which the factor rises linearly to 1; the decay begins after them.

    Raises:
        ValueError: another schedule.
    """
    if schedule not in _DECAYS:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return _DECAYS[schedule](min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps)))
