"""Optimal-transport pairing: what it does to a finetuning at equal steps and data, and what it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from ....training.transport import PAIRINGS, transported
from ... import ablation
from ...runs import Runs
from ...summary import summary
from ...tiny_taesd import LATENT_SCALE
from ..section import Claim, Line, Plot, Section, Table, Text, shown
from ..stage import Context, Result, Stage, number, of_seeds
from .priors import digits_prior

_BATCHES = (4, 16, 64)
_CALLS, _PATHS = 5, 20
_FULL_SIDE = 64
"""Of SD's latents at 512 px."""
_CHEAP = 0.02
_METHODS = dict(zip(PAIRINGS, ("diff2flow", "diff2flow, optimal transport"), strict=True))
_NAMES = {
    "frechet_features": "Fréchet distance",
    "accuracy": "share read right",
}


def setting_of(context: Context) -> ablation.Setting:
    """Of the trainings: the ablation's, half as long, sampled in 2 steps as well."""
    normal = ablation.Setting(
        prior=digits_prior(context), narrow=True, steps=120, batch_size=16, sample_steps=(25, 4, 2)
    )
    return replace(normal, steps=6, batch_size=8, images=20, held_out=10, samples=10) if context.quick else normal


def run(context: Context) -> Result:
    """LoRAs by each pairing, the distance that is left between noise and data, and the cost."""
    setting, out = setting_of(context), context.folder("pairing")
    bench = ablation.Bench(context.own_models(), out / "work", setting, context.device)
    runs = Runs(out / "runs", setting)
    runs.make(PAIRINGS, context.seeds, lambda pairing, seed: measured(bench, pairing, seed))
    means, last = summary(runs.done()), f"validation/{setting.steps}"
    done = summary({f"pairing/{seed}": what_pairing_does(bench, seed) for seed in context.seeds})["pairing"]
    cost = seconds_of(setting.batch_size)
    cost["share"] = cost["small"] / min(means[name]["seconds_a_step"]["mean"] for name in PAIRINGS)
    numbers = {"cost, of a step": number(cost["share"], "smaller", floor=0.005, timed=True)}
    for pairing, cells in means.items():
        numbers[f"{pairing}, held-out loss"] = of_seeds(cells[last], "smaller", 0.01)
        numbers[f"{pairing}, straightness"] = of_seeds(cells["straightness/mean"], "smaller", 0.005)
        for steps in setting.sample_steps:
            cell = cells[f"samples/{steps}/frechet_features"]
            numbers[f"{pairing}, {steps} steps, Fréchet"] = of_seeds(cell, "smaller", 0.5)
    return {"setting": runs.setting, "summary": means, "pairing": done, "cost": cost, "numbers": numbers}


def measured(bench: ablation.Bench, pairing: str, seed: int) -> dict[str, Any]:
    """Trains a LoRA with a pairing: held-out loss, seconds a step, samples, straightness without guidance.

    Args:
        bench: of all runs.
        pairing: of PAIRINGS.
        seed: of the run.
    """
    name, setting = f"pairing_{pairing}_{seed}", bench.setting
    model = bench.trained(_METHODS[pairing], seed, name, setting.steps)
    times = [entry["time"] for entry in bench.logged(name) if entry["kind"] == "step"]
    return {
        "validation": bench.validation(name),
        "seconds_a_step": statistics.median(b - a for a, b in zip(times, times[1:], strict=False)),
        "straightness": bench.judge.straightness(model, 1.0, setting.sample_steps[0], seed, _PATHS),
        **bench.measured(model, seed, name),
    }


def what_pairing_does(bench: ablation.Bench, seed: int) -> dict[str, dict[str, float]]:
    """By the number of images that are paired together, 1 for none, on the training images.

    left: E|x_data - x_noise|² over that of independent noise. told: share of the noises that point most to the mean
    image of their own caption, of all captions, seen from the mean of all; how much the noise says of the caption.

    Args:
        bench: whose images are paired.
        seed: of noise and order.
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(bench.setting.images, generator=draw).tolist()
    x_data = torch.cat([bench.train.batch([i]).latent for i in order]) * LATENT_SCALE
    captions = list(bench.train.captions())
    known = sorted(set(captions))
    labels = torch.tensor([known.index(captions[i]) for i in order])
    means = torch.stack([x_data[labels == label].mean(dim=0) for label in range(len(known))])
    directions = torch.nn.functional.normalize((means - means.mean(dim=0)).flatten(1))
    x_noise = torch.randn(x_data.shape, generator=draw)
    found = {}
    for size in (1, *(size for size in _BATCHES if size <= len(x_data))):
        parts = zip(x_data.split(size), x_noise.split(size), strict=True)
        paired = torch.cat([transported(data, noise) for data, noise in parts])
        nearest = (paired.flatten(1) @ directions.T).argmax(dim=1)
        told, distance = (nearest == labels).float().mean(), (x_data - paired).square().mean()
        found[str(size)] = {"left": float(distance / (x_data - x_noise).square().mean()), "told": float(told)}
    return found


def seconds_of(items: int) -> dict[str, float]:
    """Seconds of one pairing of `items` latents, as small as the digits' and as large as SD's at 512 px."""
    found = {}
    for name, side in (("small", 8), ("large", _FULL_SIDE)):
        x_data, x_noise = torch.randn(2, items, 4, side, side, generator=torch.Generator().manual_seed(0))
        times = []
        for _ in range(_CALLS):
            began = time.perf_counter()
            transported(x_data, x_noise)
            times.append(time.perf_counter() - began)
        found[name] = statistics.median(times)
    return found


def render(result: Result) -> Section:
    """Both pairings beside each other, what they share out, and the verdict in words."""
    means, setting = result["summary"], result["setting"]
    plain, paired = (means[name] for name in PAIRINGS)
    keys = {"held-out loss": f"validation/{setting['steps']}"}
    for steps in setting["sample_steps"]:
        keys |= {f"{text}, {steps} steps": f"samples/{steps}/{key}" for key, text in _NAMES.items()}
    keys["straightness (0 is straight)"] = "straightness/mean"
    keys["seconds a training step, with what else the machine did"] = "seconds_a_step"
    rows = [(text, shown(plain[key], "{:.4f}"), shown(paired[key], "{:.4f}")) for text, key in keys.items()]
    cost = result["cost"]
    large = f"{1000 * cost['large']:.1f} ms"
    claims = [
        replace(_less("straightness without guidance", "straightness/mean", plain, paired), main=True),
        *(
            _less(f"Fréchet distance in {steps} steps", f"samples/{steps}/frechet_features", plain, paired)
            for steps in setting["sample_steps"][1:]
        ),
        Claim(
            f"time of the pairing, of a training step (batch {setting['batch_size']})",
            f"{cost['share']:.2%}", f"≤ {_CHEAP:.0%}", cost["share"] <= _CHEAP,
        ),
    ]  # fmt: skip
    sizes = [key.split("/")[0] for key in result["pairing"] if key.endswith("/left")]
    done = [
        (size, *(shown(result["pairing"][f"{size}/{what}"], "{:.3f}") for what in ("left", "told"))) for size in sizes
    ]
    return Section(
        claims,
        (
            Text(
                f"LoRAs of rank {setting['rank']} taught a new style, {setting['steps']} steps of"
                f" {setting['batch_size']}, the same draws; only which noise goes to which image differs. The held-out"
                " loss is that of independent noise, which is what sampling uses."
            ),
            Table("Equal steps, equal data", ("", *PAIRINGS), rows),
            Table(
                "What pairing does to the training data",
                ("images paired together", "squared distance left", "noises that point to their own caption's images"),
                done,
            ),
            Text(_verdict(result) + f" One pairing of latents of 512 px takes {large}."),
            _plot(means),
        ),
    )


def _less(text: str, key: str, plain: Mapping[str, Any], paired: Mapping[str, Any]) -> Claim:
    """That pairing makes a number smaller by more than the seeds' deviations; one seed says nothing."""
    one, other = plain[key], paired[key]
    goal = "less, beyond the deviation"
    return Claim(
        f"{text}, optimal transport beside independent",
        f"{shown(other)} beside {shown(one)}",
        goal,
        other["mean"] + max(one["deviation"], other["deviation"]) < one["mean"] if one["seeds"] > 1 else None,
    )


def _verdict(result: Result) -> str:
    """What the numbers say, in a paragraph."""
    means, setting = result["summary"], result["setting"]
    plain, paired = (means[name] for name in PAIRINGS)
    size = str(setting["batch_size"])
    left, told, chance = (
        result["pairing"].get(f"{n}/{what}", {"mean": 1.0})["mean"]
        for n, what in ((size, "left"), (size, "told"), ("1", "told"))
    )
    names = {"straightness": "straightness/mean"}
    names |= {f"Fréchet distance in {n} steps": f"samples/{n}/frechet_features" for n in setting["sample_steps"]}
    words: dict[str, list[str]] = {"better": [], "worse": [], "within the deviation": []}
    for text, key in names.items():
        words[_compared(plain[key], paired[key])].append(text)
    found = "; ".join(f"{verdict}: {', '.join(texts)}" for verdict, texts in words.items() if texts)
    if plain["straightness/mean"]["seeds"] < 2:
        found = "one seed says nothing"
    return (
        f"With {size} images in a batch, of ten different captions, the best order of the noises takes"
        f" {1 - left:.1%} off the squared distance between noise and image. What it did to the samples ({found})."
        " In many dimensions all noises are nearly equally far from an image, so that a batch has little to choose"
        f" from. And the order follows the content that the captions name: {told:.0%} of the noises then point to the"
        f" images of their own caption, {chance:.0%} where they are independent, while sampling draws noise that knows"
        " no caption. Where a batch mixes captions, this can work against it."
    )


def _compared(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Of two means of which the smaller is the better one."""
    if abs(other["mean"] - one["mean"]) <= max(one["deviation"], other["deviation"]):
        return "within the deviation"
    return "better" if other["mean"] < one["mean"] else "worse"


def _plot(means: Mapping[str, Any]) -> Plot:
    lines = []
    for pairing in PAIRINGS:
        cells = means[pairing]
        steps = sorted(int(key.split("/")[1]) for key in cells if key.startswith("validation/"))
        found = [cells[f"validation/{step}"] for step in steps]
        lines.append(Line(pairing, steps, [cell["mean"] for cell in found], [cell["deviation"] for cell in found]))
    return Plot("pairing", "Held-out loss by pairing", "training step", "loss", lines, free_y=True)


def _settings(context: Context) -> Mapping[str, Any]:
    return asdict(setting_of(context))


STAGE = Stage(
    "pairing",
    "Pairing noise and images by optimal transport",
    4,
    (9.0, 0.7),
    run,
    render,
    settings=_settings,
    needs=("prior_digits",),
    seeded=True,
)
