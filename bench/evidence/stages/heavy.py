"""The reports on the tiny prior as stages, and what is measured inside the real ComfyUI.

Each stage names its minutes of one core in STAGES, reckoned by 4 ms a sample and evaluation of the narrow prior, 0.3 s
a training step of batch 16 and 0.5 s of batch 32. Two workers share them; stages that run alone count twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ... import depth_quality, reflow_negatives, reflow_quality, reflow_throughput
from ..comfy import comfy_dir, in_comfy, without_comfy
from ..stage import Context, Result, Stage, number, of_seeds
from . import heavy_shown as shown
from .depth_shown import depth
from .priors import digits_prior, scenes_prior

_STUDENTS = ("paper", "fast", reflow_quality.AGAIN)
_DEPTH = ("diff2flow", "flow_matching", "diffusion", "diff2flow, velocity weighting")
"""The paper's objectives; the velocity weighting is the paper's own: noisy images weigh as they do."""


def reflow_setting(context: Context) -> reflow_quality.Setting:
    """Of the report on reflow."""
    normal = reflow_quality.Setting(
        prior=digits_prior(context), pairs=512, steps=160, batch_size=24, samples=70, sample_steps=(25, 4, 2, 1)
    )
    if not context.quick:
        return normal
    return replace(normal, pairs=32, teacher_steps=8, steps=8, batch_size=8, samples=10)


def run_reflow(context: Context) -> Result:
    """Few steps after reflow: Table 3, and a second round."""
    methods = [*reflow_quality.BASES, *(_STUDENTS[:2] if context.quick else _STUDENTS)]
    out, setting = context.folder("reflow_quality"), reflow_setting(context)
    found = _read(
        reflow_quality.report(context.own_models(), out, setting, methods, list(context.seeds), context.device)
    )
    numbers = {}
    for method, cells in found["summary"].items():
        for steps in (4, 2, 1):
            numbers[f"{method}, {steps} steps, frechet"] = of_seeds(
                cells[f"samples/{steps}/frechet_features"], "smaller", 0.5
            )
        if "straightness/mean" in cells:
            numbers[f"{method}, straightness"] = of_seeds(cells["straightness/mean"], "smaller", 0.005)
    return {"setting": found["setting"], "summary": found["summary"], "numbers": numbers}


def run_negatives(context: Context) -> Result:
    """Negative prompts after reflow, with the LoRAs of the stage before."""
    setting = reflow_setting(context)
    work = context.folder("reflow_quality") / "work"
    each = 5 if context.quick else reflow_negatives.EACH
    found = reflow_negatives.measured(context.own_models(), work, setting, context.device, each)
    numbers = {f"{name}, with": number(each["with"], "smaller", floor=0.03) for name, each in found["shares"].items()}
    return {**found, "numbers": numbers}


def depth_setting(context: Context) -> depth_quality.Setting:
    """Of the report on depth; the rate is constant, so that half of the training can be measured, too."""
    normal = depth_quality.Setting(
        prior=scenes_prior(context), scenes=600, steps=180, parts=2, schedule="constant", held_out=50,
        ensemble_steps=2, ensemble_of=("diff2flow",), videos=False,
    )  # fmt: skip
    return replace(normal, scenes=40, held_out=10, steps=6, batch_size=8) if context.quick else normal


def run_depth(context: Context) -> Result:
    """Depth by each objective: Figure 8."""
    out, setting, seeds = context.folder("depth_quality"), depth_setting(context), list(context.seeds)
    for methods, some in ((_DEPTH, seeds), (depth_quality.SCALES, seeds[:1])):
        path = depth_quality.report(context.own_models(), out, setting, list(methods), some, context.device)
    found, numbers = _read(path), {}
    for method, cells in found["summary"].items():
        for name in ("abs_rel", "steps/10/abs_rel", "steps/2/abs_rel"):
            if name in cells:
                numbers[f"{method}, {name}"] = of_seeds(cells[name], "smaller", 0.005)
    return {"setting": found["setting"], "summary": found["summary"], "numbers": numbers}


def throughput_scale(context: Context) -> dict[str, int]:
    """Steps, batches and rounds of the pair generation."""
    if context.full:
        return {"steps": 40, "batch": 0, "batches": 2, "rounds": 3}
    return {"steps": 4 if context.quick else 10, "batch": 4, "batches": 1, "rounds": 3}


def run_throughput(context: Context) -> Result:
    """Pairs against the bare CFG-batched calls, in turns."""
    found = reflow_throughput.measured(**throughput_scale(context), device=context.device)
    shares = [b / m for b, m in zip(found["bare_seconds"], found["pairs_seconds"], strict=True)]
    spread = max(shares) - min(shares)
    numbers = {"share": number(found["share_of_bare_throughput"], "larger", spread, 0.03, len(shares), timed=True)}
    return {**found, "numbers": numbers}


def run_comfy_sampling(context: Context) -> Result:
    """Our sampler and the stock KSampler over the bare calls, inside ComfyUI."""
    rounds, steps = (2, 2) if context.quick else (5, 4)
    found = in_comfy(context, "sampling_cost.py", str(rounds), str(steps))
    numbers = {}
    for case in found["results"]:
        low, _, high = case["ratio_quartiles"]["ours"]
        name = f"ours over bare, batch {case['batch']}"
        numbers[name] = number(case["median_ratio"]["ours"], "smaller", high - low, 0.05, rounds, timed=True)
    return {**found, "numbers": numbers}


def run_comfy_training(context: Context) -> Result:
    """Our training step and core's TrainLoraNode over the bare one, inside ComfyUI: seconds and memory."""
    wanted = ("2", "--only", "speed") if context.quick else ("3", "--only", "speed", "memory")
    found = in_comfy(context, "training_cost.py", *wanted)
    speed = found["speed"]["over_bare"]
    low, _, high = speed["ratio_quartiles"]["ours"]
    rounds = found["speed"]["rounds"]
    numbers = {"step, ours over bare": number(speed["median_ratio"]["ours"], "smaller", high - low, 0.05, rounds, True)}
    if "memory" in found:
        numbers["memory, ours over bare"] = number(found["memory"]["over_bare"]["ours"], "smaller", 0.0, 0.05, 2, True)
    return {**found, "numbers": numbers}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _comfy_settings(context: Context) -> Mapping[str, Any]:
    return {"comfyui": bool(comfy_dir())}


def _reflow_settings(context: Context) -> Mapping[str, Any]:
    return asdict(reflow_setting(context))


def _depth_settings(context: Context) -> Mapping[str, Any]:
    return asdict(depth_setting(context))


COST = (
    Stage(
        "comfy_sampling", "Sampling inside ComfyUI", 2, (3.0, 1.0), run_comfy_sampling, shown.comfy_sampling,
        settings=_comfy_settings, alone=True, left_out=without_comfy,
    ),
    Stage(
        "comfy_training", "A training step inside ComfyUI", 2, (7.0, 2.0), run_comfy_training, shown.comfy_training,
        settings=_comfy_settings, alone=True, left_out=without_comfy,
    ),
    Stage(
        "reflow_throughput", "Making pairs", 2, (1.0, 0.5), run_throughput, shown.throughput,
        settings=throughput_scale, alone=True,
    ),
)  # fmt: skip
CLAIMS = (
    Stage(
        "reflow_quality", "Reflow (Table 3), and a second round", 3, (28.0, 1.5), run_reflow, shown.reflow,
        settings=_reflow_settings, needs=("prior_digits",), seeded=True,
    ),
    Stage(
        "reflow_negatives", "Negative prompts after reflow", 3, (3.0, 0.5), run_negatives, shown.negatives,
        settings=_reflow_settings, needs=("reflow_quality",),
    ),
    Stage(
        "depth_quality", "Depth (Figure 8)", 3, (22.0, 1.5), run_depth, depth,
        settings=_depth_settings, needs=("prior_scenes",), seeded=True,
    ),
)  # fmt: skip
