"""What is measured on the pack alone, a function each; `PHASES` has them in the order of what is worth most."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...training.loop import Loop
from ...training.parallel import Processes
from ..random_backbone import RandomBackbone
from ..reflow_throughput import shares
from . import cards, comfy_phases, drawing, precision, variants
from .setting import Setting, emptied
from .steps import Case, dataset, measured, prepared

SD15 = (
    Case("light", 4),
    Case("light", 1),
    Case("light", 4, True),
    Case("paper-small", 4, True),
    Case("light", 4, precision="fp16"),
    Case("full", 4, True),
)
SDXL = (Case("light", 4, True), Case("light", 1, True), Case("paper-small", 4, True))
"""Rows of docs/settings.md, what most people train first; and the others:"""
MORE_SD15 = (
    Case("paper-base", 4, True),
    Case("light", 1, precision="fp16"),
    Case("light", 1, True),
    Case("paper-small", 1),
    Case("paper-small", 4),
    Case("paper-base", 4),
    Case("full", 1),
)
MORE_SDXL = (
    Case("light", 1),
    Case("light", 1, precision="fp16"),
    Case("paper-base", 4, True),
    Case("light", 4),
)
_TINY = {"SD1.5": (Case("full", 1, True, "bf16"),), "SDXL": (Case("light", 2, precision="fp32"),)}


def environment(setting: Setting) -> None:
    """Versions, and what the card is."""
    import diffusers
    import peft

    found: dict[str, Any] = {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}
    if not setting.small:
        about = torch.cuda.get_device_properties(setting.device)
        found |= {"card": about.name, "capability": f"{about.major}.{about.minor}", "memory_bytes": about.total_memory}
        found |= {"free_bytes": torch.cuda.mem_get_info()[0], "cuda": torch.version.cuda}
        found |= {"tf32_matmul": torch.backends.cuda.matmul.allow_tf32, "tf32_conv": torch.backends.cudnn.allow_tf32}
    setting.findings.tell(**found)


def steps_sd15(setting: Setting) -> None:
    """Our step over the bare one, and the peak over the estimate, for rows of docs/settings.md: SD1.5."""
    _steps(setting, "SD1.5", _TINY["SD1.5"] if setting.small else SD15)


def steps_sdxl(setting: Setting) -> None:
    """The same for SDXL."""
    _steps(setting, "SDXL", _TINY["SDXL"] if setting.small else SDXL)


def steps_more(setting: Setting) -> None:
    """The same for the rows that are left."""
    rows = {"SDXL": _TINY["SDXL"]} if setting.small else {"SD1.5": MORE_SD15, "SDXL": MORE_SDXL}
    for family, cases in rows.items():
        with emptied():
            _steps(setting, family, cases)


def _steps(setting: Setting, family: str, cases: Sequence[Case]) -> None:
    """Each case in turn with the bare step; the first one for longer, as it is what a card is known by."""
    dtype = torch.float32 if setting.small else torch.float16
    backbone, side = setting.backbone(family, dtype), setting.side(family)
    for number, case in enumerate(cases):
        effort = {"steps": 1, "rounds": 1} if setting.small else {"steps": 5, "rounds": 1 if number else 3}
        about = {"family": family, **case.about(side)}
        what = f"{family} {case.preset}, batch {case.batch}, {case.precision}"
        setting.findings.case(what, partial(measured, backbone, side, case, **effort), **about)


def waits(setting: Setting) -> None:
    """Where the host waits for the card within a training step, by torch's own word."""
    if setting.small:
        setting.findings.skip("waits", "needs a card")
        return
    backbone = setting.backbone("SD1.5", torch.float16)
    for name in ("adamw", "prodigy", "schedule_free"):
        setting.findings.case(f"waits, {name}", partial(_waits_of_steps, backbone, name), optimizer=name)


def _waits_of_steps(backbone: RandomBackbone, optimizer: str, steps: int = 6) -> dict[str, Any]:
    """Waits a step by file and line, of all steps but the first."""
    case, seen = Case("light", 2, optimizer=optimizer), []
    with dataset(backbone, 256) as data, prepared(backbone, case) as adapters, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, name, line, *_: seen.append((str(message), name, line))
        loop = Loop(backbone, data, adapters, case.settings(steps), Processes())

        def due(step: int) -> bool:
            if step == 1:
                torch.cuda.set_sync_debug_mode("warn")
            return False

        try:
            loop.run(lambda report: None, due, lambda: False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = Counter(f"{Path(name).name}:{line}" for said, name, line in seen if "synchroniz" in said)
    return {"a_step": {place: count / (steps - 1) for place, count in found.most_common(12)}}


def pairs(setting: Setting) -> None:
    """Pairs a minute against the bare CFG-batched calls, at the batch that the pack chooses."""
    for family in ("SD1.5",) if setting.small else ("SD1.5", "SDXL"):
        with emptied():
            backbone = setting.backbone(family, torch.float32 if setting.small else torch.float16)
            steps, batch = (2, 2) if setting.small else (10 if family == "SD1.5" else 4, 0)
            run = partial(shares, backbone, setting.side(family), steps, batch, 1, 1 if setting.small else 2)
            setting.findings.case(f"pairs of {family}", run, family=family)
            del backbone


def optimizers(setting: Setting) -> None:
    """A step with each optimizer: its seconds and its memory."""
    names = ("adafactor",) if setting.small else ("adamw", "adamw_8bit", "adafactor", "prodigy", "schedule_free")
    backbone = setting.backbone("SD1.5", torch.float32 if setting.small else torch.float16)
    side, effort = setting.side("SD1.5"), {"steps": 1 if setting.small else 5, "rounds": 1, "with_bare": False}
    preset, precision = ("light", "fp32") if setting.small else ("paper-small", "bf16")
    for name in names:
        case = Case(preset, 4, not setting.small, precision, name)
        about = {"family": "SD1.5", **case.about(side)}
        setting.findings.case(name, partial(measured, backbone, side, case, **effort), **about)


Phase = Callable[[Setting], None]
PHASES: dict[str, Phase] = {
    "environment": environment,
    "precision": precision.small,
    "images": drawing.images,
    "steps_sd15": steps_sd15,
    "training": drawing.training,
    "waits": waits,
    "steps_sdxl": steps_sdxl,
    "comfy": comfy_phases.dynamic,
    "pairs": pairs,
    "cards": cards.cards,
    "variants": variants.steps,
    "variants_pairs": variants.pairs,
    "steps_more": steps_more,
    "precision_full_size": precision.full_size,
    "optimizers": optimizers,
    "compiled": variants.compiled,
    "comfy_plain": comfy_phases.plain,
}
