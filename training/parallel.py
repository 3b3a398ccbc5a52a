"""Data-parallel training under `accelerate launch`: who this process is, and averages over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        index: of this one; 0 is the only one that writes.
        count: of all.
    """

    index: int = 0
    count: int = 1

    @property
    def is_writer(self) -> bool:
        """Whether this one writes files."""
        return self.index == 0

    def part(self, count: int, micro: int, accumulation: int) -> slice:
        """Which items of a batch of `count` this process takes in micro-batch `micro` of `accumulation`."""
        size = count // (accumulation * self.count)
        first = (micro * self.count + self.index) * size
        return slice(first, first + size)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over all processes; all must call it with the same shapes.

        Raises:
            RuntimeError: another process is gone.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def launched() -> bool:
    """Whether this process is one of several started by `accelerate launch` (or torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def joined() -> Processes:
    """The processes of this run, connected by accelerate; alone where nothing launched several."""
    if not launched():
        return Processes()
    state: Any = _partial_state()
    return Processes(state.process_index, state.num_processes)


def _partial_state() -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError(
            "several processes were launched, but the package 'accelerate' is not installed: run 'pip install"
            " accelerate', or start one process"
        ) from error
    return PartialState()
