"""What a run is made on: the card, or in small the CPU, and networks of the families' full size, or tiny ones."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ...hosts import use
from ...hosts.headless.host import HeadlessHost
from ...nodes import NODE_CLASS_MAPPINGS
from ..full_unets import UNETS
from ..memory_table import USUAL_SIDE
from ..random_backbone import RandomBackbone
from ..random_prior import build_random
from ..tiny_unet import unet_config
from .findings import Findings

_SMALL_SIDE, _SMALL_WIDTH, _SMALL_CHECKPOINT = 64, 32, 64
_DESKTOP = 0.6
"""GiB of a pretended card that CUDA's own context and the desktop have."""
FULL, FULL_FP32, SLIM, COMFY = (f"{name}.safetensors" for name in ("full", "full_fp32", "slim", "comfy"))
"""Checkpoints of random weights: SD1.5's own size in fp16 and in fp32, one level of it in fp16, and the same in small,
where the others are smaller than ComfyUI takes."""


@dataclass(frozen=True)
class Setting:
    """Of a run.

    Args:
        small: on the CPU with tiny networks, to try the run itself.
        folder: of checkpoints and what is trained; thrown away after it.
        findings: what it tells.
    """

    small: bool
    folder: Path
    findings: Findings

    @property
    def device(self) -> torch.device:
        """That the networks are on."""
        return torch.device("cpu" if self.small else "cuda:0")

    def side(self, family: str) -> int:
        """Of the square images of a family, pixels."""
        return _SMALL_SIDE if self.small else USUAL_SIDE[family]

    def config(self, family: str) -> Mapping[str, Any]:
        """Arguments of the family's UNet."""
        if not self.small:
            return UNETS[family]
        return unet_config(2 if family == "SDXL" else 1, 1, family.partition(".")[0], width=_SMALL_WIDTH)

    def backbone(self, family: str, dtype: torch.dtype) -> RandomBackbone:
        """A network of the family with random weights, on the device."""
        return RandomBackbone(self.config(family), self.device, dtype)

    @cached_property
    def host(self) -> HeadlessHost:
        """The headless host, in use from then on, with the checkpoints."""
        folders = [self.folder / name for name in ("models", "input", "output")]
        for folder in (*folders, folders[0] / "checkpoints", folders[0] / "loras"):
            folder.mkdir(parents=True, exist_ok=True)
        host = HeadlessHost(*folders, device=self.device.type)
        use(host)
        return host

    def checkpoint(self, name: str) -> str:
        """The name of a checkpoint, made if need be."""
        path = self.host.directory("checkpoints") / name
        if path.is_file():
            return name
        device = self.device.type
        if name == FULL_FP32:
            _in_float32(self.host.directory("checkpoints") / self.checkpoint(FULL), path)
        elif self.small and name != COMFY:
            build_random(path, text_layers=1, width=_SMALL_CHECKPOINT)
        elif name in (SLIM, COMFY):
            build_random(path, device=device)
        else:
            build_random(path, levels=4, blocks=2, device=device)
        return name


def node(name: str, **inputs: Any) -> Any:
    """What a node returns, as a host calls it."""
    made = NODE_CLASS_MAPPINGS[name]()
    returned = getattr(made, made.FUNCTION)(**inputs)
    return returned["result"] if isinstance(returned, dict) else returned


@contextmanager
def emptied() -> Iterator[None]:
    """Before and after it the card's memory holds nothing that nobody reaches; its peak is counted from here."""
    _empty()
    try:
        yield
    finally:
        _empty()


def restart_peak() -> None:
    """The peak of the card's memory is counted from here on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    """Bytes that tensors held at most, and that torch took for them; nothing on the CPU."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


@contextmanager
def pretended_card(gib: float) -> Iterator[None]:
    """This process may take as much memory as a smaller card has, and is told so.

    Args:
        gib: of the card; 0.6 of it are not ours.
    """
    total, limit = torch.cuda.mem_get_info()[1], int((gib - _DESKTOP) * 2**30)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return max(0, limit - torch.cuda.memory_reserved()), limit

    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        with patch.object(torch.cuda, "mem_get_info", mem_get_info):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether products of float32 are rounded to TF32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = on
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    restart_peak()


def _in_float32(half: Path, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(half).items()}
    save_file(state, str(path))
