"""A small teacher and small pairs, for the tests of reflow."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.tests.training_fakes import CONTEXT_WIDTH, SilentProgress, TinyBackbone
from diff2flow_nodes.training import reflow
from diff2flow_nodes.training.pair_dataset import PairDataset
from diff2flow_nodes.training.prompts import Prompts
from diff2flow_nodes.training.reflow import Maker, PairSettings
from diff2flow_nodes.training.teacher import TeacherSettings

PROMPTS = Prompts(["a {red|blue} fox", "a cat", "a {large|small} boat"])
FLOW = FlowParameterization(Alignment(NoiseSchedule.scaled_linear(), "eps"))


def encode(caption: str) -> tuple[Tensor, Tensor | None]:
    """Three tokens that depend on the letters."""
    total = sum(i * ord(letter) for i, letter in enumerate(caption, 1))
    return torch.sin(torch.arange(3 * CONTEXT_WIDTH).reshape(1, 3, -1) * 0.1 + total), None


def maker(backbone: Any = None, flow: FlowParameterization = FLOW, **changes: Any) -> Maker:
    """The small network as a teacher."""
    network = backbone or TinyBackbone()
    return Maker(**{"network": lambda: nullcontext(network), "flow": flow, "model_id": "m", "text_id": "t",
                    "encode": encode, **changes})  # fmt: skip


def pair_settings(count: int = 20, **changes: Any) -> PairSettings:
    """Latents of 4 × 4, three steps."""
    small = {"teacher": TeacherSettings(3, 2.0), "size": (32, 32), "batch_size": 1, "negative": "ugly"}
    return PairSettings(count, **{**small, **changes})


def make(folder: Path, count: int = 20, progress: Any = None, by: Maker | None = None, **changes: Any) -> PairDataset:
    """Pairs in `folder`."""
    bar = progress or SilentProgress()
    return reflow.reflow_pairs(
        folder, PROMPTS, by or maker(), pair_settings(count, **changes), lambda total, title: bar
    )


@contextmanager
def shards_of(pairs: int) -> Any:
    """Shards are written when they have so many pairs."""
    before, reflow._SHARD_PAIRS = reflow._SHARD_PAIRS, pairs
    try:
        yield
    finally:
        reflow._SHARD_PAIRS = before


class Slow(SilentProgress):
    """Every step takes 4 ms."""

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        time.sleep(0.004)


if __name__ == "__main__":  # forks a process that makes pairs whenever it is told to, and says how that ended
    with tempfile.TemporaryDirectory() as first:  # imports what is imported late, once for all
        make(Path(first), 1)
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            with shards_of(3):
                make(Path(sys.argv[1]), int(sys.argv[2]), Slow())
            os._exit(0)
        print(child, flush=True)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
