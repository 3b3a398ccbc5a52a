"""What several ways of doing one thing cost, measured in turns so that a busy machine is busy for all of them."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Seconds = Mapping[str, list[float]]
"""Of each way, one number a round."""


def cpu_seconds(way: Callable[[], Any]) -> Callable[[], float]:
    """A way that returns the CPU seconds it took."""

    def timed() -> float:
        began = time.process_time()
        way()
        return time.process_time() - began

    return timed


def gpu_seconds(way: Callable[[], Any]) -> Callable[[], float]:
    """A way that returns the seconds from its start until the GPU has done it, by the GPU's own clock."""

    def timed() -> float:
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        way()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1000

    return timed


def seconds_on(device: str) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    """How a way is timed on a device: CPU seconds on the CPU, the GPU's own elsewhere.

    Args:
        device: torch's name of it, "cpu" or "cuda".
    """
    return cpu_seconds if device == "cpu" else gpu_seconds


def interleaved(ways: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each way in every round; with `warm_up` one more round goes before, and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + warm_up):
        for name, way in ways.items():
            seconds[name].append(way())
    return {name: taken[int(warm_up) :] for name, taken in seconds.items()}


def ratios(seconds: Seconds, base: str) -> dict[str, dict[str, Any]]:
    """Median and quartiles, over the rounds, of each way's seconds as a multiple of those of `base`."""
    found = {name: [t / b for t, b in zip(taken, seconds[base], strict=True)] for name, taken in seconds.items()}
    result = {"median_ratio": {name: statistics.median(each) for name, each in found.items()}}
    if all(len(each) > 1 for each in found.values()):
        result["ratio_quartiles"] = {name: statistics.quantiles(each, n=4) for name, each in found.items()}
    return result


def medians(seconds: Seconds) -> dict[str, float]:
    """Median seconds of each way."""
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def machine() -> dict[str, Any]:
    """What was measured on."""
    return {"torch": torch.__version__, "machine": platform.processor(), "threads": torch.get_num_threads()}


def restarted_peak(cuda: bool) -> int:
    """Bytes held now, from which `peak_bytes` counts anew; what was freed goes back to the system first (Linux).

    Args:
        cuda: the GPU's memory, else the process's.
    """
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes(cuda: bool) -> int:
    """The most bytes that were held since `restarted_peak`."""
    return torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")


def _status(name: str) -> int:
    """A size in bytes from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
