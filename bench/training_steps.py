"""A training step on a fixed batch, bare and by Diff2Flow Train, on either host's network, and the time it takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from diff2flow_nodes.hosts import current
from diff2flow_nodes.training.adapters import trainable
from diff2flow_nodes.training.dataset import Item, LatentDataset, context_key
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
        first, last = self._marks[0], self._marks[-1]
        if self._cuda:
            torch.cuda.synchronize()
        taken = first.elapsed_time(last) / 1000 if self._cuda else last - first
        return taken / (len(self._marks) - 1)

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
        draw, device = torch.Generator().manual_seed(2), backbone.device
        x, target = (torch.randn(material.latents[:batch].shape, generator=draw).to(device) for _ in "12")
        tau = 999.0 * torch.rand(batch, generator=draw).to(device)
        context = torch.cat(material.contexts[:batch]).clone().to(device)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=RATE, fused=True)
        cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")  # as ours does
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with cast:
                loss = torch.nn.functional.mse_loss(network(backbone.module, x, tau, context).float(), target)
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
        job = Job(backbone, _dataset(material, folder), LORA, settings, output, Keeping(folder / "runs"))
        finetune(job, host.progress(steps, "cost"))


def _dataset(material: Material, folder: Path) -> LatentDataset:
    stored, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    side, items = 8 * material.latents.shape[-1], []
    for i, (latent, context) in enumerate(zip(material.latents, material.contexts, strict=True)):
        stored.add({f"image{i}": latent[None]})
        texts.add({context_key(caption(i)): context})
        items.append(Item(f"{i}.png", caption(i), f"image{i}", side, side))
    texts.add({context_key(""): material.contexts[0]})
    stored.flush()
    texts.flush()
    return LatentDataset("cost", tuple(items), stored, texts)
