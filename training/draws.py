"""All randomness of a training run, each draw a function of (seed, purpose, number).

Nothing depends on what was drawn before, so a resumed run needs no generator state, every process of a data-parallel
run can draw the whole batch and take its part, and the host's global generators are never touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


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


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Items of a batch: the dataset is gone through again and again, each time in another order.

    Args:
        count: items in the dataset, at least 1.
        batch_size: items in a batch; may be larger than the dataset.
        seed: of the run.
        step: 0, 1, 2, ...
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()
        chosen.append(orders[epoch][place])
    return chosen
