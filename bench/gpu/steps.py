"""A training step of ours and the bare one, in turns, and what they take of the card's memory."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...training.adapters import Trained, trainable
from ...training.checkpointing import checkpointed
from ...training.dataset import LatentDataset
from ...training.insertion import float32_network
from ...training.layers import PRESETS
from ...training.loop import Loop, autocast_dtype
from ...training.memory import estimate, memory_of
from ...training.parallel import Processes
from ...training.settings import OptimizerSettings, TrainSettings
from ..random_backbone import RandomBackbone, square_sizes
from ..training_steps import StepClock, bare_steps, stored
from .setting import emptied, peak, restart_peak

_ITEMS, _RATE = 16, 1e-4
_SCALE = 5.0
"""Standard deviation of the made-up latents, about that of an autoencoder's."""
_WARM_UP = 2
"""Intervals of a round that do not count: the allocator and the libraries choose their ways in them."""
CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One way to train.

    Args:
        preset: of `training.layers.PRESETS`.
        batch: images in a call of the network.
        checkpointing, precision, optimizer, compile: as in Diff2Flow Optimizer Config.
    """

    preset: str
    batch: int
    checkpointing: bool = False
    precision: str = "bf16"
    optimizer: str = "adamw"
    compile: bool = False

    def settings(self, steps: int) -> TrainSettings:
        """Of a run of so many steps."""
        options = OptimizerSettings(
            name=self.optimizer,
            checkpointing=self.checkpointing,
            precision=self.precision,
            compile=self.compile,
        )
        return TrainSettings(steps, self.batch, _RATE, optimizer=options)

    def about(self, side: int) -> dict[str, Any]:
        """What a finding says of it."""
        return {"side": side, **asdict(self)}


@contextmanager
def dataset(backbone: RandomBackbone, side: int, count: int = _ITEMS) -> Iterator[LatentDataset]:
    """Latents and texts that nobody has made, on disk as a dataset has them."""
    draw = torch.Generator().manual_seed(1)
    latents = _SCALE * torch.randn(count, 4, side // 8, side // 8, generator=draw)
    context, pooled = backbone.texts(count)
    with tempfile.TemporaryDirectory() as name:
        yield stored(Path(name), latents, context.split(1), None if pooled is None else pooled.split(1))


@contextmanager
def prepared(backbone: RandomBackbone, case: Case) -> Iterator[Trained]:
    """The network with what the case trains."""
    with ExitStack() as stack:
        if PRESETS[case.preset].full:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            backbone.save(Path(folder) / "base.safetensors")
        stack.enter_context(computing(backbone, case.precision))
        adapters = stack.enter_context(trainable(backbone, PRESETS[case.preset], 0))
        stack.enter_context(checkpointed(backbone.module, case.checkpointing))
        yield adapters


def computing(backbone: RandomBackbone, precision: str) -> AbstractContextManager[Any]:
    """The network as Diff2Flow Train has it for a precision: in float32 where nothing is cast."""
    return nullcontext() if autocast_dtype(precision, backbone.device) else float32_network(backbone)


def measured(
    backbone: RandomBackbone, side: int, case: Case, steps: int = 5, rounds: int = 2, with_bare: bool = True
) -> dict[str, Any]:
    """Seconds a step (the median over all rounds), the ratio to the bare step, peaks in bytes, and the estimate.

    Ours is the loop of Diff2Flow Train with its dataset on disk, without what a run does once: files and samples.

    Args:
        backbone: what is trained.
        side: of the square images, pixels.
        case: how.
        steps: timed ones of each way in a round.
        rounds: of both ways in turns.
        with_bare: else ours alone.
    """
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    ratios, found = [], _reckoned(backbone, side, case)
    for _ in range(rounds):
        ours, held = _ours(backbone, side, case, steps)
        seconds["ours"] += ours
        found |= held
        if with_bare:
            bare, held = _bare(backbone, side, case, steps)
            seconds["bare"] += bare
            found |= {f"bare_{name}": value for name, value in held.items()}
            ratios.append(statistics.median(ours) / statistics.median(bare))
    found |= {f"{name}_seconds": statistics.median(each) for name, each in seconds.items() if each}
    if ratios:
        found["ratio"] = statistics.median(ratios)
    if "peak_bytes" in found and "estimate_bytes" in found:
        found["peak_over_estimate"] = found["peak_bytes"] / found["estimate_bytes"]
    return found


def _reckoned(backbone: RandomBackbone, side: int, case: Case) -> dict[str, int]:
    """What the pack's memory check says, in bytes."""
    originals = memory_of(backbone.module)
    with emptied(), dataset(backbone, side) as data, prepared(backbone, case) as adapters:
        loop = Loop(backbone, data, adapters, case.settings(1), Processes())
        micro = loop.micro_batch(list(range(case.batch)), 0)
        found = estimate(backbone.module, case.settings(1), lambda: loop.loss(micro), originals)
    if found is None:
        return {}
    parts = {name: getattr(found, name) for name in ("frozen", "trained", "activations")}
    return {"estimate_bytes": found.total, **{f"estimate_{name}_bytes": each for name, each in parts.items()}}


def _ours(backbone: RandomBackbone, side: int, case: Case, steps: int) -> tuple[list[float], dict[str, int]]:
    count = steps + 1 + _WARM_UP
    with emptied(), dataset(backbone, side) as data, prepared(backbone, case) as adapters:
        loop = Loop(backbone, data, adapters, case.settings(count), Processes())
        restart_peak()
        with StepClock(backbone.device.type) as clock, compiled(backbone, case.compile):
            loop.run(lambda report: None, lambda step: False, lambda: False)
        held = peak()
    return clock.intervals()[_WARM_UP:], held


def _bare(backbone: RandomBackbone, side: int, case: Case, steps: int) -> tuple[list[float], dict[str, int]]:
    with emptied(), prepared(backbone, case) as adapters:
        given = conditioning(backbone, case.batch, side)
        restart_peak()
        with StepClock(backbone.device.type) as clock:
            bare_steps(
                lambda x, tau: backbone(x, tau, given),
                adapters.parameters(),
                (case.batch, 4, side // 8, side // 8),
                steps + 1 + _WARM_UP,
                CASTS.get(case.precision),
            )
        held = peak()
    return clock.intervals()[_WARM_UP:], held


def conditioning(backbone: RandomBackbone, batch: int, side: int) -> Mapping[str, torch.Tensor]:
    """What the network takes beside x and tau, on its device."""
    given = backbone.conditioning(*backbone.texts(batch), square_sizes(batch, side))
    return {name: value.to(backbone.device) for name, value in given.items()}


@contextmanager
def compiled(backbone: RandomBackbone, on: bool, **options: Any) -> Iterator[None]:
    """The network through torch.compile while the context lasts.

    Args:
        options: of torch.compile.
    """
    if on:
        backbone.module.compile(**options)
    try:
        yield
    finally:
        backbone.module._compiled_call_impl = None
