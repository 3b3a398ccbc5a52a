"""Memory and time of data by its amount: datasets of up to 100 000 images, manifests of up to a million pairs."""

from __future__ import annotations

import gc
import random
import shutil
import statistics
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....training.dataset import Item, LatentDataset, context_key
from ....training.pairs import PairStore, Run, Share
from ....training.shards import ShardStore
from ..section import Claim, Line, Plot, Section, Table, Text
from ..stage import Context, Result, Stage, number

_BATCH, _DRAWN = 16, 30
_CAPTIONS = 10
_SHARD = 64
_PAIRS_A_SHARD = 8000
_IDENTITY = {"made": "for the bench"}
_FLAT = 2.0
"""A batch of the largest dataset may take so many times as long as one of the smallest, and so much memory."""


def dataset_scale(context: Context) -> dict[str, list[int]]:
    """Numbers of images."""
    return {"items": [100, 1000, 10_000] if context.quick else [100, 1000, 10_000, 100_000]}


def pairs_scale(context: Context) -> dict[str, list[int]]:
    """Numbers of pairs."""
    return {"pairs": [10_000, 100_000] if context.quick else [10_000, 100_000, 1_000_000]}


def run_dataset(context: Context) -> Result:
    """Index and batches of datasets of latents that nothing was encoded for."""
    found = []
    for count in dataset_scale(context)["items"]:
        folder = context.folder("growth_data") / str(count)
        shutil.rmtree(folder, ignore_errors=True)
        found.append({"items": count, **dataset_costs(folder, count)})
        shutil.rmtree(folder)
    numbers = {
        f"bytes an item of {case['items']}": number(case["bytes"] / case["items"], "smaller", floor=50.0)
        for case in found[1:]
    }
    return {"cases": found, "numbers": numbers}


def dataset_costs(folder: Path, count: int) -> dict[str, float]:
    """Bytes of the index, seconds to load and check it and to draw a batch; bytes that batches hold and leave behind.

    Args:
        folder: of the shards, empty.
        count: of images; their latents are 4 × 8 × 8 zeros, 64 a shard.
    """
    _fill(folder, count)
    began = time.perf_counter()
    dataset = _dataset(folder, count)
    loading = time.perf_counter() - began
    seconds = _draw(dataset, _DRAWN)
    del dataset
    gc.collect()
    tracemalloc.start()
    dataset = _dataset(folder, count)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    held = [_held(dataset, chosen) for chosen in _chosen(dataset, _DRAWN)]
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - kept
    tracemalloc.stop()
    batches = {"batch_seconds": seconds, "batch_bytes": max(held), "left_bytes": left}
    return {"bytes": kept, "load_seconds": loading, **batches}


def _fill(folder: Path, count: int) -> None:
    latents = ShardStore(folder / "latents", _SHARD)
    for first in range(0, count, _SHARD):
        latents.add({f"image {i}": torch.zeros(1, 4, 8, 8) for i in range(first, min(count, first + _SHARD))})
    latents.flush()
    texts = ShardStore(folder / "texts")
    texts.add({context_key(f"caption {i}"): torch.zeros(1, 77, 32) for i in range(_CAPTIONS)})
    texts.flush()


def _dataset(folder: Path, count: int) -> LatentDataset:
    items = tuple(Item(f"image {i}", f"caption {i % _CAPTIONS}", f"image {i}", 64, 64) for i in range(count))
    return LatentDataset("bench", items, ShardStore(folder / "latents", _SHARD), ShardStore(folder / "texts"))


def _draw(dataset: LatentDataset, batches: int) -> float:
    """Median seconds of batches of random items."""
    seconds = []
    for chosen in _chosen(dataset, batches):
        began = time.perf_counter()
        dataset.batch(chosen)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _chosen(dataset: LatentDataset, batches: int) -> Iterator[list[int]]:
    """Random items of each batch, always the same."""
    order = random.Random(0)
    for _ in range(batches):
        yield [order.randrange(len(dataset)) for _ in range(_BATCH)]


def _held(dataset: LatentDataset, chosen: list[int]) -> int:
    """The most bytes that drawing a batch takes beside what was there before."""
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    dataset.batch(chosen)
    return tracemalloc.get_traced_memory()[1] - before


def run_pairs(context: Context) -> Result:
    """Index of folders of pairs that no teacher made."""
    found = []
    for count in pairs_scale(context)["pairs"]:
        folder = context.folder("growth_pairs") / str(count)
        shutil.rmtree(folder, ignore_errors=True)
        found.append({"pairs": count, **pairs_costs(folder, count)})
        shutil.rmtree(folder)
    numbers = {
        f"index bytes a pair of {case['pairs']}": number(case["index_bytes"] / case["pairs"], "smaller", floor=0.5)
        for case in found
    }
    return {"cases": found, "numbers": numbers}


class _WithoutNoise(PairStore):
    """Drawing a million noises takes a minute, and nobody reads them here."""

    def noise(self, shape: Sequence[int], pair: int) -> Tensor:
        return torch.zeros(tuple(shape))


def pairs_costs(folder: Path, count: int) -> dict[str, Any]:
    """Bytes of the index and of all else that is kept, seconds to open the folder and to find a pair.

    Args:
        folder: of the shards, empty.
        count: of pairs; their latents are single zeros, 8000 a shard.
    """
    store = _WithoutNoise(folder, _IDENTITY, 0, count)
    for first in range(0, count, _PAIRS_A_SHARD):
        here = min(_PAIRS_A_SHARD, count - first)
        captions = tuple(f"prompt {i}" for i in range(here))
        store.write(Run(first, 1, captions, torch.zeros(here, 1, 1, 1, dtype=torch.float16)), Share())
    del store
    gc.collect()
    tracemalloc.start()
    began = time.perf_counter()
    store = _WithoutNoise(folder, _IDENTITY, 0, count)
    opening = time.perf_counter() - began
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if len(store.present) != count:
        raise ValueError(f"{count} pairs were written, {len(store.present)} are found")
    began = time.perf_counter()
    store.latent(count - 1)
    finding = time.perf_counter() - began
    return {"index_bytes": store.nbytes(), "other_bytes": kept, "open_seconds": opening, "find_seconds": finding}


def render_dataset(result: Result) -> Section:
    """Bytes and seconds by the number of images."""
    cases = result["cases"]
    slower = cases[-1]["batch_seconds"] / cases[0]["batch_seconds"]
    more = cases[-1]["batch_bytes"] / cases[0]["batch_bytes"]
    times = f"{cases[-1]['items'] // cases[0]['items']} times as many images"
    claims = [
        Claim(f"memory of drawing a batch, {times}", f"{more:.2f} times", f"≤ {_FLAT:g}", more <= _FLAT, main=True),
        Claim(f"bytes an image in the index of {cases[-1]['items']}", f"{cases[-1]['bytes'] / cases[-1]['items']:.0f}"),
    ]
    rows = [
        (f"{case['items']:,}", f"{case['bytes'] / 1e6:.2f}", f"{case['bytes'] / case['items']:.0f}",
         f"{case['load_seconds']:.2f}", f"{1e3 * case['batch_seconds']:.2f}", f"{case['batch_bytes'] / 1e3:.0f}",
         f"{case['left_bytes'] / (_DRAWN * _BATCH):.0f}")
        for case in cases
    ]  # fmt: skip
    head = (
        "images",
        "index, MB",
        "bytes an image",
        "seconds to load and check",
        f"ms a batch of {_BATCH}",
        "kB a batch holds",
        "bytes that stay, an image drawn",
    )
    note = Text(
        f"Latents of 4 × 8 × 8 that nothing was encoded for, {_SHARD} a shard; batches of random images. A batch of the"
        f" largest takes {slower:.1f} times as long as one of the smallest, whose shards are all kept open. What stays"
        " comes with shards that are opened for the first time. Counted is what Python and numpy allocate, the"
        " batch itself among it; of torch's own memory nothing."
    )
    x = [case["items"] for case in cases]
    line = Line("", x, [1e3 * case["batch_seconds"] for case in cases])
    plot = Plot("growth_data", "Drawing a batch", "images in the dataset", "ms a batch", [line], log_x=True)
    return Section(claims, (note, Table("", head, rows), plot))


def render_pairs(result: Result) -> Section:
    """Bytes and seconds by the number of pairs."""
    cases = result["cases"]
    rows = [
        (f"{case['pairs']:,}", f"{case['index_bytes'] / 1e6:.2f}", f"{case['other_bytes'] / 1e6:.2f}",
         f"{case['open_seconds']:.2f}", f"{1e3 * case['find_seconds']:.1f}")
        for case in cases
    ]  # fmt: skip
    head = ("pairs", "index, MB", "all else kept, MB", "seconds to open and check", "ms to find a pair")
    last = cases[-1]
    each = (last["index_bytes"] + last["other_bytes"]) / last["pairs"]
    claim = Claim(f"bytes a pair in memory, of {last['pairs']:,} pairs", f"{each:.1f}", "≤ 10", each <= 10)
    note = Text(f"Pairs of single zeros, {_PAIRS_A_SHARD} a shard: what counts is their number.")
    return Section([claim], (note, Table("", head, rows)))


STAGES = (
    Stage(
        "growth_data", "How a dataset grows", 2, (2.0, 0.2), run_dataset, render_dataset, settings=dataset_scale,
        alone=True,
    ),
    Stage(
        "growth_pairs", "How pairs grow", 2, (1.0, 0.2), run_pairs, render_pairs, settings=pairs_scale, alone=True
    ),
)  # fmt: skip
