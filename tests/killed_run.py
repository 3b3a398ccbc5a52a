"""What `test_training_killed.py` runs in processes of their own, to kill them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (before the fork)
import torch
import torch.utils.checkpoint  # noqa: F401

from diff2flow_nodes.tests.training_fakes import SilentProgress, tiny_dataset, tiny_job
from diff2flow_nodes.training.finetune import Watch, finetune
from diff2flow_nodes.training.layers import LoraSettings
from diff2flow_nodes.training.settings import OptimizerSettings

STEPS, SAVE_EVERY, KEEP = 500, 7, 2


class _Slow(SilentProgress):
    """Makes every step last a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        time.sleep(self._seconds)


def train(folder: Path, save_every: int, seconds: float = 0.0) -> None:
    """The whole run, or what is left of it, at least `seconds` a step."""
    torch.set_num_threads(1)
    job = tiny_job(
        folder,
        lora=LoraSettings(rank=4, alpha=4.0),
        dataset=tiny_dataset(folder / "data"),
        watch=Watch(sample_every=SAVE_EVERY, draw=_drawn),
        keeping={"save_every": save_every, "keep": KEEP, "memory_check": False},
        steps=STEPS,
        learning_rate=1e-3,
        optimizer=OptimizerSettings(ema=0.9),
    )
    finetune(job, _Slow(seconds))


def _drawn(model: Any, flow: Any, text: Any) -> list[tuple[str, torch.Tensor]]:
    return [("1 step", torch.zeros(1, 8, 8, 3))]
