"""All randomness of a training run, each draw a function of (seed, purpose, number).

Nothing depends on what was drawn before, so a resumed run needs no generator state, every process of a data-parallel
run can draw the whole batch and take its part, and the host's global generators are never touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Buckets = Sequence[Sequence[int]]
"""Items of equal size together, an item as often as it is repeated."""


def generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A fresh CPU generator of its own for one draw."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def uniform(count: int, seed: int, step: int) -> Tensor:
    """(count,) float32 in [0, 1): the times of a step."""
    return torch.rand(count, generator=generator(seed, "times", step))


def noise(shape: Sequence[int], seed: int, step: int) -> Tensor:
    """Standard normal float32 of that shape: the noise of a step."""
    return torch.randn(*shape, generator=generator(seed, "noise", step))


def flips(count: int, seed: int, step: int) -> list[bool]:
    """For each image of a step, whether it is mirrored: with probability 1/2."""
    return (torch.rand(count, generator=generator(seed, "flips", step)) < 0.5).tolist()


def dropouts(count: int, probability: float, seed: int, step: int) -> list[bool]:
    """For each image of a step, whether its caption is left out.

    Raises:
        ValueError: the probability is not in [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of leaving captions out must be from 0 to 1 (0.1 is usual): {probability}")
    return (torch.rand(count, generator=generator(seed, "dropouts", step)) < probability).tolist()


class Order:
    """The order in which a run sees its items.

    Each bucket is gone through again and again, each time in another order, one pass going over into the next. An
    epoch has ceil(items / batch_size) batches of each bucket, the buckets in a drawn order.

    Args:
        buckets: see `Buckets`; none is empty.
        batch_size: items in a batch; may be larger than a bucket.
        seed: of the run.

    Raises:
        ValueError: a bucket is empty, there is none, or batch_size is below 1.
    """

    def __init__(self, buckets: Buckets, batch_size: int, seed: int) -> None:
        if not buckets or not all(buckets) or batch_size < 1:
            raise ValueError(
                f"batches need at least one item in each bucket and a batch_size of at least 1, not"
                f" {[len(bucket) for bucket in buckets]} items and {batch_size}"
            )
        self._buckets, self._batch_size, self._seed = buckets, batch_size, seed
        self._batches = [math.ceil(len(bucket) / batch_size) for bucket in buckets]
        self._passes = [_Passes(len(bucket), seed, f"order/{b}") for b, bucket in enumerate(buckets)]
        self._epoch, self._plan = -1, torch.empty(2, 0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return sum(self._batches)

    def batch(self, step: int) -> list[int]:
        """Items of the batch of step 0, 1, 2, ..."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._planned(epoch)
        bucket, rank = self._plan[:, place].tolist()
        first = (epoch * self._batches[bucket] + rank) * self._batch_size
        return [self._buckets[bucket][self._passes[bucket].at(first + i)] for i in range(self._batch_size)]

    def _planned(self, epoch: int) -> Tensor:
        """(2, steps_per_epoch) int32: for each step of an epoch its bucket, and how often that came before in it."""
        ends = torch.tensor(list(accumulate(self._batches)))
        order = torch.randperm(self.steps_per_epoch, generator=generator(self._seed, "buckets", epoch))
        bucket = torch.searchsorted(ends, order, right=True)
        together = bucket.argsort(stable=True)
        rank = torch.empty_like(bucket)
        rank[together] = torch.arange(len(bucket)) - (ends - torch.tensor(self._batches))[bucket[together]]
        return torch.stack([bucket, rank]).to(torch.int32)


class _Passes:
    """An endless stream of 0 .. count-1, each pass in another order; holds the last two passes it was asked for."""

    def __init__(self, count: int, seed: int, purpose: str) -> None:
        self._count, self._seed, self._purpose = count, seed, purpose
        self._orders: dict[int, Tensor] = {}

    def at(self, position: int) -> int:
        number, place = divmod(position, self._count)
        if number not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            draw = generator(self._seed, self._purpose, number)
            self._orders[number] = torch.randperm(self._count, generator=draw).to(torch.int32)
        return int(self._orders[number][place])
