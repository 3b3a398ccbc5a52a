"""Data-parallel training under `accelerate launch`: this run's processes, and averages over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .launch import launched

_STEP_PATIENCE = timedelta(minutes=30)
"""How long a process that does not answer within a step is waited for."""
_WRITER_PATIENCE = timedelta(days=7)
"""The same while one process does what is done once, such as encoding a large folder."""


class ProcessLostError(RuntimeError):
    """Another process of the run ended or does not answer."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        index: of this one; 0 is the only one that writes.
        count: of all.
        group: torch.distributed's, for waiting and telling.
    """

    index: int = 0
    count: int = 1
    group: Any = field(default=None, repr=False, compare=False)

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
            ProcessLostError: another process is gone.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        with _losses_named():
            torch.distributed.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            ProcessLostError: another process is gone.
        """
        if self.count > 1:
            with _losses_named():
                torch.distributed.barrier(self.group)

    def told(self, text: str) -> str:
        """The writer's text, in every process; raises as `wait`."""
        if self.count == 1:
            return text
        message = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor(len(message))
        with _losses_named():
            torch.distributed.broadcast(size, 0, self.group)
            message = message if self.is_writer else torch.empty(int(size), dtype=torch.uint8)
            torch.distributed.broadcast(message, 0, self.group)
        return bytes(message.tolist()).decode()

    @contextmanager
    def writer_first(self) -> Iterator[None]:
        """The others enter when the writer has left, and find what it wrote; raises as `wait`."""
        if not self.is_writer:
            self.wait()
        yield
        if self.is_writer:
            self.wait()


def joined(device: torch.device) -> Processes:
    """The processes of this run, connected by accelerate at the first call; alone where nothing launched several.

    Args:
        device: that is trained on; on "cpu" they talk through gloo.

    Raises:
        ValueError: several were launched and accelerate is not installed or cannot connect them.
    """
    return _connected(device.type == "cpu") if launched() else Processes()


@lru_cache(maxsize=1)
def _connected(cpu: bool) -> Processes:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError(
            "several processes were launched, but the package 'accelerate' is not installed: run 'pip install"
            " accelerate', or start one process"
        ) from error
    state: Any = PartialState(cpu=cpu, timeout=_STEP_PATIENCE)
    if state.num_processes == 1:
        raise ValueError(
            f"several processes were launched, but accelerate cannot connect them on this device"
            f" ({state.distributed_type}): start one process, or choose another device"
        )
    group = torch.distributed.new_group(timeout=_WRITER_PATIENCE, backend="gloo")
    return Processes(state.process_index, state.num_processes, group)


@contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(
            "another process of this run ended or does not answer; what it said itself is the reason"
        ) from error
