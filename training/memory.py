"""How much memory a run will take, before it starts; what to do where that is too much."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checkpointing import each_told
from .optimizers import BYTES_PER_PARAMETER
from .settings import TrainSettings

_LOG = logging.getLogger(__name__)
_UNTRACEABLE = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError, KeyError)
"""What kernels raise on tensors without values. A host's own interruption is none of these, and goes on."""

_TRANSIENT = 1.15
"""Activations that are not kept for the backward pass, gradients of activations, and the allocator's waste, as a
factor of those that are kept."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device.

    Args:
        frozen: weights that are not trained, and originals of those that are trained in copies.
        trained: the trained weights with gradients, optimizer and averages.
        activations: of one micro-batch.
        present: of the trained weights, which are on the device already.
    """

    frozen: int
    trained: int
    activations: int
    present: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.activations

    @property
    def added(self) -> int:
        """What the first steps add to what is on the device."""
        return self.trained + self.activations - self.present

    def __str__(self) -> str:
        parts = (self.total, self.frozen, self.trained, self.activations)
        total, frozen, trained, activations = (f"{part / 2**30:.2f}" for part in parts)
        return (
            f"about {total} GiB: {frozen} frozen weights, {trained} what is trained with its optimizer,"
            f" {activations} activations"
        )


def estimate(
    network: nn.Module, settings: TrainSettings, loss: Callable[[], Tensor], originals: Mapping[int, int] | None = None
) -> Estimate | None:
    """What a run takes, found by tracing one micro-batch without computing or allocating anything.

    Args:
        network: all networks that the loss calls, with what is trained in them.
        settings: of the run.
        loss: the loss of one micro-batch, called once with torch's FakeTensorMode on.
        originals: `memory_of` the networks before training put anything into them.

    Returns:
        None where the network cannot be traced so (attention kernels that look at memory addresses).
    """
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in network.parameters() if not p.requires_grad)
    here = memory_of(network)
    aside = sum(size for storage, size in (originals or {}).items() if storage not in here)
    each = 8 + BYTES_PER_PARAMETER[settings.optimizer.name] + (4 if settings.optimizer.ema else 0)
    try:
        kept = _kept_for_backward(network, loss)
    except _UNTRACEABLE as error:  # whatever a kernel cannot do with fake tensors; the run does not depend on it
        _LOG.info("The memory of this run cannot be estimated (%s: %s)", type(error).__name__, error)
        return None
    return Estimate(frozen + aside, int(trained * each), int(kept * _TRANSIENT), 4 * trained)


def memory_of(network: nn.Module) -> dict[int, int]:
    """Bytes of each storage that holds weights of a network, by its address as an object."""
    return {_storage(weight): weight.untyped_storage().nbytes() for weight in network.parameters()}


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device, memory that torch holds and does not use included; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "xpu" and hasattr(torch.xpu, "mem_get_info"):
        free, _ = torch.xpu.mem_get_info(device)
        return free + torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
    if device.type in ("cpu", "mps"):  # Apple's GPUs share the system's memory
        import psutil

        return psutil.virtual_memory().available
    return None


def release(device: torch.device) -> None:
    """Frees what nobody reaches, and what torch keeps of a device's memory for later."""
    give_back()
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "empty_cache"):
        module.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory ran out: torch's own class, or words where a backend has none."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def give_back() -> None:
    """Frees what nobody reaches, and hands it back to the system: glibc would keep most of what training took."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def require_room(needed: Estimate | None, device: torch.device, settings: TrainSettings) -> str:
    """Whether a run fits into a device's free memory, in words.

    Raises:
        ValueError: it does not; says what to change.
    """
    if needed is None:
        return "the memory of this run could not be estimated, so it was not checked"
    free = free_memory(device)
    if free is None:
        return f"memory: {needed}; how much is free on {device} cannot be told, so it was not checked"
    if needed.added <= free:
        return f"memory: {needed}"
    raise ValueError(
        f"this run needs {needed}; only {free / 2**30:.2f} GiB are free beside the network on {device}:"
        f" {_advice(needed, settings)}, or set memory_check to off to try all the same"
    )


def smaller_memory(settings: TrainSettings) -> str:
    """What to change where memory ran out though one item was in a network call, the most helpful first."""
    ways = [] if settings.optimizer.checkpointing else ["switch checkpointing on"]
    ways.append("lower the dataset's resolution")
    if settings.objective.transports:
        ways.append("lower batch_size, or choose pairing 'independent'")
    return ", or ".join([*ways, *_lighter(settings), "close what else uses the device"])


def _advice(needed: Estimate, settings: TrainSettings) -> str:
    """What to change, the most helpful first."""
    optimizer, ways = settings.optimizer, []
    if needed.activations <= needed.trained:
        return ", or ".join(_lighter(settings))
    if not optimizer.checkpointing:
        ways.append("switch checkpointing on")
    if settings.batch_size > optimizer.accumulation:
        ways.append(f"raise accumulation ({optimizer.accumulation}) towards batch_size ({settings.batch_size})")
    ways.append("lower the dataset's resolution")
    return ", or ".join(ways)


def _lighter(settings: TrainSettings) -> list[str]:
    """How what is trained takes less memory."""
    ways = ["lower the LoRA's rank"]
    if settings.optimizer.name == "adamw":
        ways.append("choose adamw_8bit or adafactor")
    if settings.optimizer.ema:
        ways.append("set ema to 0")
    return ways


def _kept_for_backward(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, the network's own weights left out.

    Of checkpointed blocks, what the largest of them keeps when it is computed again in the backward pass.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        real = [*network.parameters(), *network.buffers()]
        fake = [mode.from_tensor(weight) for weight in real]  # held: the mode forgets what nobody holds
        own = {_storage(weight) for weight in (*real, *fake)}
        blocks = [0]
        with each_told(lambda block: blocks.append(_kept_by(block, own))):
            return _kept_by(loss, own) + max(blocks)


def _kept_by(call: Callable[[], Any], own: Set[int]) -> int:
    """Bytes of what autograd keeps of a call, but for some storages."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> None:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = (tensor.untyped_storage().nbytes(), tensor)  # alive: its address stays its own

    # The graph holds `pack` and what it returns: were its tensors reachable from there, nothing would ever free it.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        try:
            call()
            return sum(size for size, _ in kept.values())
        finally:
            kept.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
