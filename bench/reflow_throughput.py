"""How fast pairs are made, against the bare CFG-batched calls: `python -m diff2flow_nodes.bench.reflow_throughput`.

A full-size SD1.5 UNet with random weights (or a slim one on the CPU), pairs of 512 × 512 px (CPU: 256 × 256), prompts
encoded before; everything else counts: noise, text embeddings from disk, the solver, checks, shards on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..alignment import Alignment
from ..samplers.parameterization import FlowParameterization
from ..training.prompts import Prompts
from ..training.reflow import Maker, PairSettings, reflow_pairs
from ..training.teacher import BatchSize, TeacherSettings
from .full_unets import UNETS
from .random_backbone import RandomBackbone, square_sizes
from .tiny_unet import unet_config

_PROMPTS, _CFG = 16, 7.5
_TRIALS = 3
"""Batches after which a batch size that grows has found its end: one item, a few, and as many as fit."""


class _Silent:
    def update(self, done: int, text: str = "", preview: Any = None) -> None: ...

    def event(self, entry: Any) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    """Prints a line of JSON, see `measured`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=0, help="pairs in a call; 0: 4 on the CPU, what fits on a GPU")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measured(options.steps, options.batch, options.batches, options.rounds)))


def measured(steps: int, batch: int, batches: int, rounds: int, device: str = "") -> dict[str, Any]:
    """`shares` of a full-size SD1.5 on a GPU, of a slim one on the CPU.

    Args:
        steps, batch, batches, rounds: see `shares`.
        device: "cpu" or "cuda"; "": cuda where there is one.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = chosen.type == "cuda"
    config = UNETS["SD1.5"] if on_gpu else unet_config(2, 2, width=64)
    backbone = RandomBackbone(config, chosen, torch.float16 if on_gpu else torch.float32)
    return shares(backbone, 512 if on_gpu else 256, steps, batch, batches, rounds)


def shares(backbone: RandomBackbone, side: int, steps: int, batch: int, batches: int, rounds: int) -> dict[str, Any]:
    """Seconds of bare calls and of pairs in turns, and the share of the bare calls' throughput, their median.

    Args:
        backbone: the teacher.
        side: of the square images, pixels.
        steps: of the teacher.
        batch: pairs in a call; 0: 4 on the CPU, on a GPU what the pack finds to fit.
        batches: of a round.
        rounds: of both.
    """
    batch = batch or fitting(backbone, side)
    bare, made = [], []
    for _ in range(rounds):  # in turn, so that both meet the same neighbours
        bare.append(_bare(backbone, batch, side, steps * batches))
        made.append(_pairs(backbone, side, steps, batch, batches))
    share = statistics.median(b / m for b, m in zip(bare, made, strict=True))
    a_minute = 60 * batch * batches / statistics.median(made)
    about = {"device": str(backbone.device), "batch": batch, "side": side, "steps": steps, "batches": batches}
    times = {"bare_seconds": bare, "pairs_seconds": made, "pairs_a_minute": a_minute}
    return {**about, **times, "share_of_bare_throughput": share}


def fitting(backbone: RandomBackbone, side: int) -> int:
    """How many pairs a call makes where the pack chooses."""
    size = BatchSize(0, backbone.device)

    def batch(count: int) -> int:
        _bare(backbone, count, side, 1)
        return count

    for _ in range(_TRIALS):
        size.run(batch)
    return size.now


@torch.no_grad()
def _bare(backbone: RandomBackbone, batch: int, side: int, calls: int) -> float:
    """Seconds of so many CFG-batched calls and nothing else."""
    device = backbone.device
    x = torch.randn(2 * batch, 4, side // 8, side // 8, device=device)
    tau, (context, pooled) = torch.full((len(x),), 500.0, device=device), backbone.texts(len(x))
    given = backbone.conditioning(context, pooled, square_sizes(len(x), side))
    given = {name: value.to(device) for name, value in given.items()}
    _synchronized(backbone(x, tau, given))
    began = time.perf_counter()
    for _ in range(calls):
        output = backbone(x, tau, given)
    _synchronized(output)
    return time.perf_counter() - began


def _pairs(backbone: RandomBackbone, side: int, steps: int, batch: int, batches: int) -> float:
    """Seconds in which pairs are made and written, the prompts encoded before."""
    settings = PairSettings(batch * batches, 0, TeacherSettings(steps, _CFG), size=(side, side), batch_size=batch)
    prompts = Prompts([f"prompt {i}" for i in range(_PROMPTS)])
    flow = FlowParameterization(Alignment(backbone.schedule, "eps"))
    seconds = []

    def network() -> Any:
        seconds.append(time.perf_counter())
        return nullcontext(backbone)

    maker = Maker(network, flow, "model", "text", lambda caption: backbone.texts(1))
    with tempfile.TemporaryDirectory() as folder:
        reflow_pairs(Path(folder), prompts, maker, settings, lambda total, title: _Silent())
    return time.perf_counter() - seconds[0]


def _synchronized(output: torch.Tensor) -> None:
    output.flatten()[0].item()


if __name__ == "__main__":
    main()
