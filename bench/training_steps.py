"""A training step on a fixed batch, bare and by Diff2Flow Train, on either host's network, and the time it takes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from diff2flow_nodes.hosts import current
from diff2flow_nodes.training.adapters import trainable
from diff2flow_nodes.training.dataset import Item, LatentDataset, context_key, pooled_key
from diff2flow_nodes.training.finetune import Job, Keeping, finetune
from diff2flow_nodes.training.layers import GROUPS, LoraSettings
from diff2flow_nodes.training.product import Output
from diff2flow_nodes.training.settings import TrainSettings
from diff2flow_nodes.training.shards import ShardStore

BATCH, ITEMS, RANK, RATE = 4, 16, 8, 1e-4
LORA = LoraSettings(groups=GROUPS, rank=RANK, alpha=float(RANK))
Network = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Calls a host's network with x (B, 4, H, W), tau (B,) and context (B, 77, D); its output."""


class StepClock:
    """While the context lasts, takes the time whenever any optimizer has made a step: what repeats in a training, and
    nothing of how it begins and ends. On the CPU it counts CPU seconds, on CUDA the device's own time.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._cuda, self._marks = device != "cpu", []

    def __enter__(self) -> StepClock:
        self._hook = register_optimizer_step_post_hook(lambda *_: self._marks.append(self._mark()))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def seconds(self) -> float:
        """Mean from one step to the next."""
        return statistics.fmean(self.intervals())

    def intervals(self) -> list[float]:
        """Seconds from each step to the next."""
        if self._cuda:
            torch.cuda.synchronize()
        return [self._between(*pair) for pair in pairwise(self._marks)]

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000 if self._cuda else last - first

    def _mark(self) -> Any:
        if not self._cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Material:
    """What is trained on what.

    Args:
        model: MODEL of the host in use.
        contexts: (1, 77, D), the embedding of each item's caption, all different; at least ITEMS.
        latents: (ITEMS, 4, side, side) in the autoencoder's scale.
    """

    model: Any
    contexts: list[Tensor]
    latents: Tensor


def caption(i: int) -> str:
    """Of an item."""
    return f"a drawing of {i} things"


def latents(side: int) -> Tensor:
    """(ITEMS, 4, side, side), random, in the autoencoder's scale."""
    return 5.0 * torch.randn(ITEMS, 4, side, side, generator=torch.Generator().manual_seed(1))


def bare(material: Material, network: Network, steps: int, batch: int = BATCH) -> None:
    """Forward, backward and AdamW on one fixed batch: the least that such a step can be."""
    with current().training(material.model) as backbone, trainable(backbone, LORA, 0) as adapters:
        context = torch.cat(material.contexts[:batch]).clone().to(backbone.device)
        cast = torch.bfloat16 if backbone.device.type == "cuda" else None  # as ours does

        def output(x: Tensor, tau: Tensor) -> Tensor:
            return network(backbone.module, x, tau, context)

        bare_steps(output, adapters.parameters(), (batch, *material.latents.shape[1:]), steps, cast)


def bare_steps(
    output: Callable[[Tensor, Tensor], Tensor],
    parameters: list[nn.Parameter],
    shape: tuple[int, ...],
    steps: int,
    cast: torch.dtype | None = None,
    fused: bool = True,
) -> None:
    """The bare steps of a network that is ready to be trained.

    Args:
        output: of the network, at x (B, 4, H, W) and tau (B,) on the parameters' device.
        parameters: that are trained.
        shape: of x.
        steps: how many.
        cast: of the matrix products, None for none.
        fused: whether AdamW is one kernel, as ours is.
    """
    draw, device = torch.Generator().manual_seed(2), parameters[0].device
    x, target = (torch.randn(shape, generator=draw).to(device) for _ in "12")
    tau = 999.0 * torch.rand(shape[0], generator=draw).to(device)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=fused)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            loss = torch.nn.functional.mse_loss(output(x, tau).float(), target)
        loss.backward()
        optimizer.step()
        del loss  # with its graph, which would live on beside the next one


def ours(material: Material, steps: int, batch: int = BATCH) -> None:
    """The whole run of Diff2Flow Train, from shards to a LoRA file, with its log and the host's progress bar."""
    host = current()
    with tempfile.TemporaryDirectory() as name, host.training(material.model) as backbone:
        folder = Path(name)
        (folder / "loras").mkdir()
        settings = TrainSettings(steps, batch, RATE)
        output = Output(folder / "loras", "cost")
        data = stored(folder, material.latents, material.contexts)
        finetune(Job(backbone, data, LORA, settings, output, Keeping(folder / "runs")), host.progress(steps, "cost"))


def stored(
    folder: Path, latents: Tensor, contexts: Sequence[Tensor], pooled: Sequence[Tensor] | None = None
) -> LatentDataset:
    """A dataset on disk, each item with a caption of its own.

    Args:
        folder: of its shards.
        latents: (N, 4, H, W) in the autoencoder's scale.
        contexts: (1, 77, D) of each item.
        pooled: (1, W) of each item, where the network takes it.
    """
    shards, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    side, items = 8 * latents.shape[-1], []
    for i, latent in enumerate(latents):
        shards.add({f"image{i}": latent[None]})
        items.append(Item(f"{i}.png", caption(i), f"image{i}", side, side))
    for i, title in [*((i, caption(i)) for i in range(len(latents))), (0, "")]:
        texts.add({context_key(title): contexts[i]})
        if pooled is not None:
            texts.add({pooled_key(title): pooled[i]})
    shards.flush()
    texts.flush()
    return LatentDataset("cost", tuple(items), shards, texts)
