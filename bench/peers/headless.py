"""The bare peft step, and Diff2Flow Train's own: `headless bare` or `headless ours`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...training.adapters import trainable
from ...training.finetune import Job, Keeping, finetune
from ...training.product import Output
from ...training.settings import TrainSettings
from ..random_backbone import RandomBackbone
from ..training_steps import bare_steps, stored
from .worker import BATCH, CONFIG, LORA, RATE, SIDE, serve, texts


def main() -> None:
    """Serves one of them."""
    backbone = RandomBackbone(CONFIG, torch.device("cpu"), torch.float32)
    serve({"bare": lambda steps: bare(backbone, steps), "ours": lambda steps: ours(backbone, steps)}[sys.argv[1]])


def bare(backbone: RandomBackbone, steps: int) -> None:
    """Forward, backward and AdamW on one fixed batch."""
    given = {"context": texts()}
    with trainable(backbone, LORA, 0) as adapters:
        shape = (BATCH, 4, SIDE, SIDE)
        bare_steps(lambda x, tau: backbone(x, tau, given), adapters.parameters(), shape, steps)


def ours(backbone: RandomBackbone, steps: int) -> None:
    """The whole run, from shards to a LoRA file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "loras").mkdir()
        latents = 5.0 * torch.randn(BATCH, 4, SIDE, SIDE)
        data = stored(folder, latents, texts().split(1))
        job = Job(backbone, data, LORA, TrainSettings(steps, BATCH, RATE), Output(folder / "loras", "x"),
                  Keeping(folder / "runs"))  # fmt: skip
        finetune(job, _Silent())


class _Silent:
    def update(self, done: int, text: str = "", preview: Any = None) -> None: ...

    def event(self, entry: Any) -> None: ...

    def command(self) -> str:
        return ""

    def close(self) -> None: ...


if __name__ == "__main__":
    main()
