"""How much memory a run will take, before it starts."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .optimizers import BYTES_PER_PARAMETER
from .settings import TrainSettings

_LOG = logging.getLogger(__name__)
_TRANSIENT = 1.15
"""Activations that are not kept for the backward pass, gradients of activations, and the allocator's waste, as a
factor of those that are kept."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device: of the frozen network, of the trained weights with gradients, optimizer and averages, and of
    the activations of one micro-batch."""

    frozen: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.activations

    @property
    def added(self) -> int:
        """What training adds to the loaded network."""
        return self.trained + self.activations

    def __str__(self) -> str:
        parts = (self.total, self.frozen, self.trained, self.activations)
        total, frozen, trained, activations = (f"{part / 2**30:.2f}" for part in parts)
        return (
            f"about {total} GiB: {frozen} the frozen network, {trained} what is trained with its optimizer,"
            f" {activations} activations"
        )


def estimate(network: nn.Module, settings: TrainSettings, loss: Callable[[], Tensor]) -> Estimate | None:
    """What a run takes, found by tracing one micro-batch without computing or allocating anything.

    Args:
        network: with its adapters.
        settings: of the run.
        loss: the loss of one micro-batch, called once with torch's FakeTensorMode on.

    Returns:
        None where the network cannot be traced so (attention kernels that look at memory addresses).
    """
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    each = 8 + BYTES_PER_PARAMETER[settings.optimizer.name] + (4 if settings.optimizer.ema else 0)
    try:
        kept = _kept_for_backward(network, loss)
    except Exception as error:  # whatever a kernel cannot do with fake tensors; the run itself does not depend on it
        _LOG.info("The memory of this run cannot be estimated (%s: %s)", type(error).__name__, error)
        return None
    return Estimate(frozen, int(trained * each), int(kept * _TRANSIENT))


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device, memory that torch holds and does not use included; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def give_back() -> None:
    """Frees what nobody reaches, and hands it back to the system: glibc would keep most of what training took."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def require_room(needed: Estimate, device: torch.device, settings: TrainSettings) -> None:
    """Raises ValueError, saying what to change, where a run does not fit into a device's free memory."""
    free = free_memory(device)
    if free is None or needed.added <= free:
        return
    raise ValueError(
        f"this run needs {needed}; only {free / 2**30:.2f} GiB are free beside the network on {device}:"
        f" {_advice(needed, settings)}, or set memory_check to off to try all the same"
    )


def _advice(needed: Estimate, settings: TrainSettings) -> str:
    """What to change, the most helpful first."""
    optimizer, ways = settings.optimizer, []
    if needed.activations > needed.trained:
        if not optimizer.checkpointing:
            ways.append("switch checkpointing on")
        if settings.batch_size > optimizer.accumulation:
            ways.append(f"raise accumulation ({optimizer.accumulation}) towards batch_size ({settings.batch_size})")
        ways.append("lower the dataset's resolution")
    else:
        ways.append("lower the LoRA's rank")
        if optimizer.name == "adamw":
            ways.append("choose adamw_8bit or adafactor")
        if optimizer.ema:
            ways.append("set ema to 0")
    return ", or ".join(ways)


def _kept_for_backward(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, the network's own weights left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, tuple[int, Tensor]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        real = [*network.parameters(), *network.buffers()]
        fake = [mode.from_tensor(weight) for weight in real]  # held: the mode forgets what nobody holds
        own = {_storage(weight) for weight in (*real, *fake)}

        def pack(tensor: Tensor) -> None:
            if _storage(tensor) not in own:
                kept[_storage(tensor)] = (tensor.untyped_storage().nbytes(), tensor)  # alive: its address stays its own

        # The graph holds `pack` and what it returns: were its tensors reachable from there, nothing would ever free it.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            try:
                loss()
                return sum(size for size, _ in kept.values())
            finally:
                kept.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
