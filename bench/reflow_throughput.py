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

from ..alignment import Alignment, NoiseSchedule
from ..samplers.parameterization import FlowParameterization
from ..training.prompts import Prompts
from ..training.reflow import Maker, PairSettings, reflow_pairs
from ..training.teacher import TeacherSettings


class _Backbone:
    """The port's Backbone, as far as a teacher needs it, around diffusers' UNet with random weights."""

    family, prediction, base_name, base_hash = "SD1", "eps", "random", ""

    def __init__(self, device: torch.device, channels: tuple[int, ...]) -> None:
        from diffusers import UNet2DConditionModel

        self.device, self.dtype = device, torch.float16 if device.type == "cuda" else torch.float32
        levels = len(channels)
        with torch.device(device):
            self.module = UNet2DConditionModel(
                block_out_channels=channels,
                down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
                cross_attention_dim=768,
                attention_head_dim=8,
            )
        self.module.to(self.dtype).eval()

    def __call__(self, x: torch.Tensor, tau: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        context = conditioning["context"].to(self.dtype)
        return self.module(x.to(self.dtype), tau, encoder_hidden_states=context, return_dict=False)[0].float()

    def conditioning(self, context: torch.Tensor, pooled: None, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"context": context}

    def unscale_latent(self, x_data: torch.Tensor) -> torch.Tensor:
        return x_data / 0.18215


class _Silent:
    def update(self, done: int, text: str = "", preview: Any = None) -> None: ...

    def event(self, entry: Any) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    """Prints a line of JSON, see `measured`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=0, help="pairs in a call; 0: 4 on the CPU, 32 on a GPU")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measured(options.steps, options.batch, options.batches, options.rounds)))


def measured(steps: int, batch: int, batches: int, rounds: int, device: str = "") -> dict[str, Any]:
    """Seconds of bare calls and of pairs in turns, and the share of the bare calls' throughput, their median.

    Args:
        steps: of the teacher.
        batch: pairs in a call; 0: 4 on the CPU, 32 on a GPU.
        batches: of a round.
        rounds: of both.
        device: "cpu" or "cuda"; "": cuda where there is one.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = chosen.type == "cuda"
    backbone = _Backbone(chosen, (320, 640, 1280, 1280) if on_gpu else (64, 128))
    batch, side = batch or (32 if on_gpu else 4), 512 if on_gpu else 256
    settings = PairSettings(batch * batches, 0, TeacherSettings(steps, 7.5), size=(side, side), batch_size=batch)
    bare, made = [], []
    for _ in range(rounds):  # in turn, so that both meet the same neighbours
        bare.append(_bare(backbone, batch, side // 8, steps * batches))
        made.append(_pairs(backbone, settings))
    share = statistics.median(b / m for b, m in zip(bare, made, strict=True))
    about = {"device": str(chosen), "batch": batch, "side": side, "steps": steps, "batches": batches}
    return {**about, "bare_seconds": bare, "pairs_seconds": made, "share_of_bare_throughput": share}


@torch.no_grad()
def _bare(backbone: _Backbone, batch: int, side: int, calls: int) -> float:
    """Seconds of so many CFG-batched calls and nothing else."""
    x = torch.randn(2 * batch, 4, side, side, device=backbone.device)
    tau, context = torch.full((len(x),), 500.0, device=x.device), torch.randn(len(x), 77, 768, device=x.device)
    _synchronized(backbone(x, tau, {"context": context}))
    began = time.perf_counter()
    for _ in range(calls):
        output = backbone(x, tau, {"context": context})
    _synchronized(output)
    return time.perf_counter() - began


def _pairs(backbone: _Backbone, settings: PairSettings) -> float:
    """Seconds in which pairs are made and written, the prompts encoded before."""
    prompts = Prompts([f"prompt {i}" for i in range(16)])
    flow = FlowParameterization(Alignment(NoiseSchedule.scaled_linear(), "eps"))
    seconds = []

    def network() -> Any:
        seconds.append(time.perf_counter())
        return nullcontext(backbone)

    maker = Maker(network, flow, "model", "text", lambda caption: (torch.randn(1, 77, 768), None))
    with tempfile.TemporaryDirectory() as folder:
        reflow_pairs(Path(folder), prompts, maker, settings, lambda total, title: _Silent())
    return time.perf_counter() - seconds[0]


def _synchronized(output: torch.Tensor) -> None:
    output.flatten()[0].item()


if __name__ == "__main__":
    main()
