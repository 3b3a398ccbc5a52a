"""What docs/settings.md promises of smaller cards, tried on pretended ones: whole runs, with their memory check."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...training.finetune import Job, Keeping, finetune
from ...training.layers import PRESETS
from ...training.port import Progress
from ...training.product import Output
from ..random_backbone import RandomBackbone
from .setting import Setting, emptied, peak, pretended_card
from .steps import Case, dataset

_PROMISED = (
    (8, "SD1.5", Case("light", 4, True)),
    (8, "SD1.5", Case("paper-small", 4, True)),
    (8, "SDXL", Case("light", 1, True)),
    (12, "SD1.5", Case("paper-base", 4, True)),
    (12, "SDXL", Case("light", 4, True)),
    (24, "SD1.5", Case("full", 4, True)),
    (24, "SDXL", Case("paper-base", 4, True)),
)
"""GiB of the card."""
_TINY = ((0, "SD1.5", Case("light", 2, precision="fp32")),)
_STEPS = 2


def cards(setting: Setting) -> None:
    """Whether each of them runs on a card of that size; in small, one that does not pretend."""
    for gib, family, case in _TINY if setting.small else _PROMISED:
        what, about = f"{gib} GiB, {family} {case.preset}", {"family": family, **case.about(setting.side(family))}
        setting.findings.case(what, partial(_tried, setting, gib, family, case), card_gib=gib, **about)


def _tried(setting: Setting, gib: int, family: str, case: Case) -> dict[str, Any]:
    """Whether it fits, and if not, what the run says."""
    dtype = torch.float32 if setting.small else torch.float16
    with emptied():
        backbone = setting.backbone(family, dtype)
        if not gib:
            return _ran(backbone, setting.side(family), case, setting.folder)
        with emptied(), pretended_card(gib):
            return _ran(backbone, setting.side(family), case, setting.folder)


def _ran(backbone: RandomBackbone, side: int, case: Case, folder: Path) -> dict[str, Any]:
    progress = _Told()
    try:
        _train(backbone, side, case, folder, progress)
    except (torch.cuda.OutOfMemoryError, ValueError) as error:
        return {"fits": False, "said": " ".join(str(error).split())[:300], **peak()}
    return {"fits": True, "in_smaller_calls": progress.of_memory, **peak()}


def _train(backbone: RandomBackbone, side: int, case: Case, folder: Path, progress: Progress) -> None:
    """A run as Diff2Flow Train makes it, thrown away."""
    with tempfile.TemporaryDirectory(dir=folder) as name, dataset(backbone, side) as data:
        if PRESETS[case.preset].full:
            backbone.save(Path(name) / "base.safetensors")
        (Path(name) / "loras").mkdir()
        output, keeping = Output(Path(name) / "loras", "card"), Keeping(Path(name) / "runs", save_every=0)
        finetune(Job(backbone, data, PRESETS[case.preset], case.settings(_STEPS), output, keeping), progress)


class _Told:
    """Progress that nobody looks at.

    Attributes:
        of_memory: what it was told of memory that ran out on the way, "" where it did not.
    """

    of_memory = ""

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        if "memory ran out" in text:
            self.of_memory = text

    def event(self, entry: Mapping[str, Any]) -> None: ...

    def command(self) -> str:
        return ""

    def close(self) -> None: ...
