"""How a run trains, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .choices import PRECISIONS
from .objective import ObjectiveSettings
from .optimizers import OPTIMIZERS
from .rates import SCHEDULES, rate_factor


@dataclass(frozen=True)
class OptimizerSettings:
    """How the weights move.

    Args:
        name: of OPTIMIZERS.
        schedule: of the learning rate, of `rates.SCHEDULES`.
        warmup_steps: steps in which the learning rate rises linearly from 0; 0 is none.
        weight_decay: at least 0.
        beta1, beta2: decay of the running means, [0, 1); adafactor and prodigy use what they have of them.
        max_grad_norm: the gradient's norm is clipped to it; 0 does not clip.
        accumulation: micro-batches a step: `batch_size` is split into so many network calls.
        checkpointing: blocks of the network forget their activations and compute them again in the backward pass.
        ema: decay of the averaged weights, which are then the ones that are saved; 0 is none; reached gradually.
        precision: of the matrix products while training: "auto" is bf16 on GPUs that have it, fp16 on older NVIDIA
            cards, else fp32; "fp32" computes in float32 whatever the weights are kept in.
        compile: the network through torch.compile.
        text_rate: learning rate of the text encoder's LoRA as a part of the network's, where it is trained.

    Raises:
        ValueError: a value out of range.
    """

    name: str = "adamw"
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    accumulation: int = 1
    checkpointing: bool = False
    ema: float = 0.0
    precision: str = "auto"
    compile: bool = False
    text_rate: float = 0.5

    def __post_init__(self) -> None:
        choices = {"name": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                shown = "optimizer" if name == "name" else name
                raise ValueError(f"{shown} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "text_rate"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, not {self.accumulation}; 1 is none")


@dataclass(frozen=True)
class TrainSettings:
    """What a run is.

    Args:
        steps: optimizer steps, at least 1.
        batch_size: items a step, at least 1, over all micro-batches and processes.
        learning_rate: above 0; prodigy wants 1.
        seed: of the order, the noise, the times and the LoRA's first weights.
        objective: what is minimised.
        optimizer: how the weights move.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    batch_size: int = 1
    learning_rate: float = 1e-4
    seed: int = 0
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}; 500 to 3000 is usual for a LoRA")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.batch_size % self.optimizer.accumulation:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulation ({self.optimizer.accumulation}):"
                " the batch is split into that many equal parts"
            )
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}; 1e-4 is usual for a LoRA")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, 2, ..."""
        optimizer = self.optimizer
        return self.learning_rate * rate_factor(optimizer.schedule, step, self.steps, optimizer.warmup_steps)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a saved state to be continued; the number of steps may grow where nothing else
        depends on it."""
        from dataclasses import asdict

        settings = asdict(self)
        settings["optimizer"] = {k: v for k, v in settings["optimizer"].items() if k not in _FREE}
        if self.optimizer.schedule == "constant" and not self.objective.reflow.consistency:
            del settings["steps"]
        if not self.objective.transports:
            del settings["objective"]["pairing"]  # states that were saved before there was a choice go on
        return settings


_FREE = ("checkpointing", "compile")
"""Changing these changes nothing that is computed."""
