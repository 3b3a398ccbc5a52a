"""The prior trained on with what it knows (Table 1), at another size (Figure 5), in a new style; by each objective."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ... import ablation as bench
from ..stage import Context, Result, Stage, of_seeds
from . import adaptation_shown as shown
from .priors import digits_prior

_WEIGHTED = "diff2flow, velocity weighting"
METHODS = {
    "continued": (bench.BASE, "diff2flow", "diffusion", _WEIGHTED),
    "resolution": (*bench.METHODS[:4], _WEIGHTED),
    "ablation": (*bench.METHODS[:4], _WEIGHTED),
}
"""The prior itself and the paper's objectives; the velocity weighting is its own: noisy images weigh as they do."""
_QUICK = (bench.BASE, "diff2flow", "diffusion")
SMALLER = 48
"""Pixels; the prior knows 64. The paper goes down, too, from 768 to 512."""


def methods(context: Context, name: str) -> tuple[str, ...]:
    """Of a stage; a quick run has those that the verdicts need."""
    return _QUICK if context.quick else METHODS[name]


def continued_setting(context: Context) -> bench.Setting:
    """Of training that goes on with the plain digits, at the size that the prior knows; half of it is measured, too."""
    return _setting(context, steps=80, parts=2, learning_rate=2e-4, samples=50, sample_steps=(25,))


def resolution_setting(context: Context) -> bench.Setting:
    """Of training at another size."""
    return _setting(context, steps=60, parts=2, size=SMALLER, sample_steps=(10,))


def ablation_setting(context: Context) -> bench.Setting:
    """Of training in a style that the prior has never seen."""
    return _setting(context, style="golden", steps=140, parts=2, batch_size=8, images=200, sample_steps=(10,))


def _setting(context: Context, **changes: Any) -> bench.Setting:
    """What all share; the rate is constant, as the paper's."""
    plain = bench.Setting(
        prior=digits_prior(context), narrow=True, style="plain", batch_size=16, images=400, held_out=60,
        schedule="constant", unguided=True,
    )  # fmt: skip
    chosen = replace(plain, **changes)
    if not context.quick:
        return chosen
    return replace(chosen, steps=6, batch_size=8, images=20, held_out=10, samples=10, sample_steps=(4,))


def run_continued(context: Context) -> Result:
    """Training resumed without any change of task: Table 1."""
    return _run(context, "continued", continued_setting(context))


def run_resolution(context: Context) -> Result:
    """Training at another size: Figure 5."""
    return _run(context, "resolution", resolution_setting(context))


def run_ablation(context: Context) -> Result:
    """Training in a new style."""
    return _run(context, "ablation", ablation_setting(context))


def _run(context: Context, name: str, setting: bench.Setting) -> Result:
    models, out = context.own_models(), context.folder(name)
    path = bench.ablation(models, out, setting, context.seeds, methods(context, name), context.device)
    found = json.loads(path.read_text(encoding="utf-8"))
    summary, steps = found["summary"], setting.sample_steps[0]
    numbers = {}
    for method, cells in summary.items():
        for kind, words in shown.KINDS.items():
            frechet, accuracy = (cells[f"{kind}/{steps}/{number}"] for number in ("frechet_features", "accuracy"))
            numbers[f"{method}, {words}, Fréchet"] = of_seeds(frechet, "smaller", 0.5)
            numbers[f"{method}, {words}, read right"] = of_seeds(accuracy, "larger", 0.02)
        numbers[f"{method}, held-out loss"] = of_seeds(shown.last_loss(cells), "smaller", 0.002)
    return {"setting": found["setting"], "summary": summary, "numbers": numbers}


def _continued_settings(context: Context) -> Mapping[str, Any]:
    return {**asdict(continued_setting(context)), "methods": methods(context, "continued")}


def _resolution_settings(context: Context) -> Mapping[str, Any]:
    return {**asdict(resolution_setting(context)), "methods": methods(context, "resolution")}


def _ablation_settings(context: Context) -> Mapping[str, Any]:
    return {**asdict(ablation_setting(context)), "methods": methods(context, "ablation")}


STAGES = (
    Stage(
        "continued", "Continued training (Table 1)", 3, (12.0, 0.8), run_continued, shown.continued,
        settings=_continued_settings, needs=("prior_digits",), seeded=True,
    ),
    Stage(
        "resolution", "Another resolution (Figure 5)", 3, (10.0, 0.8), run_resolution, shown.resolution,
        settings=_resolution_settings, needs=("prior_digits",), seeded=True,
    ),
    Stage(
        "ablation", "The objectives, a new style", 3, (10.0, 1.2), run_ablation, shown.ablation,
        settings=_ablation_settings, needs=("prior_digits",), seeded=True,
    ),
)  # fmt: skip
