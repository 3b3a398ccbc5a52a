"""How a run trains, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .objective import ObjectiveSettings

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains.

    Args:
        steps: optimizer steps, at least 1.
        batch_size: items a step, at least 1.
        learning_rate: of AdamW, above 0.
        seed: of the order, the noise, the times and the LoRA's first weights.
        objective: what is minimised.
        warmup_steps: steps in which the learning rate rises linearly from 0; 0 is none.
        weight_decay: of AdamW, at least 0.
        max_grad_norm: the gradient's norm is clipped to it; 0 does not clip.
        precision: of the matrix products while training: "auto" is bf16 on GPUs that have it, else fp16 there, and
            the network's own precision on the CPU; "fp32" never casts.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    batch_size: int = 1
    learning_rate: float = 1e-4
    seed: int = 0
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}; 500 to 3000 is usual for a LoRA")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}; 1e-4 is usual for a LoRA")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, 2, ...: constant after the warm-up."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))
