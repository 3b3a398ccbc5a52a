"""A tiny prior, loaded headless once for all runs of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hosts import use
from ..hosts.headless.host import HeadlessHost
from ..nodes import NODE_CLASS_MAPPINGS


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
        self.host = HeadlessHost(checkpoint.parent.parent, work / "input", work / "output", device)
        use(self.host)
        self.model, self.clip, self.vae = self.host.load_checkpoint(checkpoint.name)


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
