"""Who this process is among those that a launcher started, by its environment; known before torch is imported."""

from __future__ import annotations

import os

_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def launched() -> bool:
    """Whether this process is one of several started by `accelerate launch`, torchrun or mpirun."""
    return any(int(os.environ.get(name) or "1") > 1 for name in _COUNTS)


def launched_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes and started one: it does so without several GPUs."""
    return not launched() and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()


def local_device(name: str) -> str:
    """The device of this process: of several on a machine, each has its own GPU ("cuda" → "cuda:1")."""
    if not launched() or name in ("cpu", "mps") or ":" in name:
        return name
    return f"{name}:{os.environ.get('LOCAL_RANK', '0')}"
