"""A process that trains a few steps whenever it is asked to, and says what they took."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..costs import peak_bytes, restarted_peak
from ..tiny_unet import unet_config
from ..training_steps import BATCH, LORA, RANK, RATE, StepClock

CONFIG = unet_config(1, 1)
"""SD1.5 of one level with one block: 26 M parameters."""
SIDE = 16
"""Of the latents."""
WARM_UP = 1
"""Steps of a round that do not count."""
__all__ = ["BATCH", "CONFIG", "LORA", "RANK", "RATE", "SIDE", "WARM_UP", "serve", "texts"]

Way = Callable[[int], object]
"""Trains so many steps, from a fresh start."""


def serve(way: Way, **about: Any) -> None:
    """Answers "steps N" on the standard input with CPU seconds a step and peak bytes over what it held before; says
    first what it is. What the way prints goes to the standard error, so that the answers stay readable."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _say(answers, {"ready": True, "torch": torch.__version__, **about})
    for line in sys.stdin:
        try:
            _say(answers, _measured(way, int(line.split()[1])))
        except Exception as error:  # a peer's own; the others go on
            _say(answers, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def _measured(way: Way, steps: int) -> dict[str, Any]:
    before = restarted_peak(False)
    with StepClock("cpu") as clock, contextlib.redirect_stdout(sys.stderr):
        way(steps + 1 + WARM_UP)
    return {"seconds": clock.intervals()[WARM_UP:], "peak": peak_bytes(False) - before}


def _say(answers: Any, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=answers, flush=True)


def texts(width: int = 768) -> torch.Tensor:
    """(BATCH, 77, width), of captions that are all different."""
    return torch.randn(BATCH, 77, width, generator=torch.Generator().manual_seed(0))
