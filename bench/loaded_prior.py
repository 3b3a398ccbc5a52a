"""A tiny prior, loaded headless once for all runs of a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..hosts import use
from ..hosts.headless.host import HeadlessHost
from ..nodes import NODE_CLASS_MAPPINGS
from . import tiny_prior
from .kept import kept


class LoadedPrior:
    """A checkpoint with a host of its own folders.

    Args:
        checkpoint: its path; the models folder is two above it.
        work: folder of inputs, runs and pictures.
        device: that the network is on.

    Attributes:
        host, model, clip, vae: loaded.
    """

    def __init__(self, checkpoint: Path, work: Path, device: str = "cpu") -> None:
        self.work = work
        self._checkpoint = checkpoint
        self.host = HeadlessHost(checkpoint.parent.parent, work / "input", work / "output", device)
        use(self.host)
        self.model, self.clip, self.vae = self.host.load_checkpoint(checkpoint.name)

    def kept(self, name: str, made: Callable[[], Tensor]) -> Tensor:
        """A tensor that follows from the checkpoint, made once for all reports of a models folder.

        Args:
            name: of the file.
            made: makes it.
        """
        path = self._checkpoint.parent.parent / "measured" / f"{self._checkpoint.stem}_{name}.safetensors"
        about = self._checkpoint.stat()
        return kept(path, f"{about.st_size} {about.st_mtime_ns}", lambda: {"tensor": made()})["tensor"]


class OnPrior:
    """What all runs of a report have in common: the prior as narrow as it was trained, loaded once.

    Args:
        models: models folder with the prior.
        work: folder of inputs, runs and pictures.
        setting: of the report; `setting.prior` is the prior's quality.
        device: that the network is on.
    """

    def __init__(self, models: Path, work: Path, setting: Any, device: str = "cpu") -> None:
        self._prior = prior = LoadedPrior(tiny_prior.ensure_narrow(setting.prior, models), work, device)
        self.setting, self._work, self._host = setting, work, prior.host
        self._model, self._clip, self._vae = prior.model, prior.clip, prior.vae


def lora_everywhere(rank: int, ends_in_full: bool = False, widening: str = "zeros") -> Any:
    """D2F_LORA of one rank on every linear and convolution layer.

    Args:
        rank: of every layer.
        ends_in_full: first and last layer in full.
        widening: see `training.layers.LoraSettings`.
    """
    switches = dict.fromkeys(("attention_out", "feed_forward", "proj", "conv", "time"), True)
    build = NODE_CLASS_MAPPINGS["Diff2FlowLoraConfig"]().build
    return build("custom", rank, float(rank), ends_in_full=ends_in_full, widening=widening, **switches)[0]
