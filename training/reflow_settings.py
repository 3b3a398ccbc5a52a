"""What reflow adds to an objective, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ReflowSettings:
    """Which straight lines are learned. The defaults change nothing.

    Args:
        windows: equal parts of the path from the start of sampling to t = 1, each of which is made straight by the
            teacher while training (piecewise rectification); 0: the whole line between noise and data.
        window_steps: Euler steps of the teacher across a window, at least 1.
        teacher_cfg: guidance of that teacher, at least 0; at 1 the negative is not computed.
        consistency: share of the run, its end, in which the network learns to predict from each point of a pair's line
            what it predicts itself one step nearer to the data; [0, 1].
        consistency_steps: how many such steps the whole path has, at least 1.
        drop_worst: share of the pairs that is left out, those with the greatest distance between noise and data;
            [0, 1).

    Raises:
        ValueError: a number out of range, or windows together with consistency.
    """

    windows: int = 0
    window_steps: int = 8
    teacher_cfg: float = 7.5
    consistency: float = 0.0
    consistency_steps: int = 8
    drop_worst: float = 0.0

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise ValueError(f"windows must be at least 0, not {self.windows}; 4 is usual")
        for name in ("window_steps", "consistency_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}; 8 is usual")
        if not 0.0 <= self.teacher_cfg < math.inf:
            raise ValueError(f"teacher_cfg must be at least 0, not {self.teacher_cfg}; 7.5 is usual")
        if not 0.0 <= self.consistency <= 1.0:
            raise ValueError(f"consistency must be from 0 to 1, not {self.consistency}; 0.2 is a short phase")
        if not 0.0 <= self.drop_worst < 1.0:
            raise ValueError(f"drop_worst must be from 0 to below 1, not {self.drop_worst}; 0.1 is usual")
        if self.windows and self.consistency:
            raise ValueError("windows and consistency cannot be combined: set one of them to 0")

    @property
    def guides_online(self) -> bool:
        """Whether the teacher is called while training, with its negative."""
        return self.windows > 0 and not math.isclose(self.teacher_cfg, 1.0)
