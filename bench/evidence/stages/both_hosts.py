"""What the same sampling costs headless and inside the real ComfyUI, in turns."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from ....hosts import use
from ....hosts.headless.host import HeadlessHost
from ....nodes import NODE_CLASS_MAPPINGS
from ...costs import seconds_on
from ..comfy import comfy_dir, in_comfy, median_seconds, random_checkpoint, unit, without_comfy
from ..section import Claim, Section, Table
from ..stage import Context, Result, Stage, number

GOAL = 1.05
_CFG = 4.0


def settings(context: Context) -> dict[str, Any]:
    """Rounds, steps of the sampling, and whether ComfyUI is there."""
    return {"rounds": 2 if context.quick else 5, "steps": 4, "comfyui": bool(comfy_dir())}


def run(context: Context) -> Result:
    """Seconds of our sampler on either host: a process of ComfyUI, then headless, again and again."""
    about = settings(context)
    sampled, timed, found = _headless(context, about["steps"]), seconds_on(context.device), []
    for _ in range(about["rounds"]):
        in_host = in_comfy(context, "sampling_cost.py", "1", str(about["steps"]))["results"]
        found.append([_both(sampled, timed, case) for case in in_host])
    cases = [_summed(list(each)) for each in zip(*found, strict=True)]
    numbers = {
        f"headless over ComfyUI, batch {case['batch']}": number(
            case["ratio"], "smaller", case["spread"], 0.1, about["rounds"], timed=True
        )
        for case in cases
    }
    about |= {"device": context.device}
    return {"cases": cases, "numbers": numbers, **{name: about[name] for name in ("steps", "rounds", "device")}}


def _headless(context: Context, steps: int) -> Any:
    """A function of batch and side: the headless sampling."""
    checkpoint, folder = random_checkpoint(context), context.folder("both_hosts")
    host = HeadlessHost(checkpoint.parent.parent, folder / "input", folder / "output", context.device)
    use(host)
    model, clip, _ = host.load_checkpoint(checkpoint.name)
    positive, negative = (host.encode_text(clip, text) for text in ("a three", ""))
    sample = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]().sample

    def sampled(batch: int, side: int) -> None:
        latent = {"samples": torch.zeros(batch, 4, side, side)}
        sample(model, positive, negative, latent, 1, steps, _CFG, "euler", 1.0, "auto")

    return sampled


def _both(sampled: Any, timed: Any, case: dict[str, Any]) -> dict[str, float]:
    """Seconds on both hosts, ours and the bare calls of ComfyUI; the first headless run does not count."""
    way = partial(sampled, case["batch"], case["latent"])
    way()
    comfy = median_seconds(case)
    return {
        "batch": case["batch"],
        "latent": case["latent"],
        "headless": timed(way)(),
        "comfyui": comfy["ours"],
    }


def _summed(rounds: list[dict[str, float]]) -> dict[str, Any]:
    shares = [each["headless"] / each["comfyui"] for each in rounds]
    medians = {name: statistics.median(each[name] for each in rounds) for name in ("headless", "comfyui")}
    sizes = {name: int(rounds[0][name]) for name in ("batch", "latent")}
    return {**sizes, **medians, "ratio": statistics.median(shares), "spread": max(shares) - min(shares)}


def render(result: Result) -> Section:
    """Seconds on both hosts."""
    rows = [
        (str(case["batch"]), str(case["latent"]), f"{case['headless']:.3f}", f"{case['comfyui']:.3f}",
         f"{case['ratio']:.3f} ± {case['spread']:.3f}")
        for case in result["cases"]
    ]  # fmt: skip
    last = result["cases"][-1]
    text = f"Diff2Flow Sampler headless over the same inside ComfyUI, batch {last['batch']}"
    value = f"{last['ratio']:.3f} ± {last['spread']:.3f}"
    claim = Claim(text, value, f"≤ {GOAL}", last["ratio"] <= GOAL)
    head = ("batch", "latent side", "headless, s", "ComfyUI, s", "ratio (± range of the rounds)")
    title = f"{unit(result)} of {result['steps']} steps, {result['rounds']} rounds in turns"
    return Section([claim], (Table(title, head, rows),))


STAGE = Stage(
    "both_hosts", "Headless against ComfyUI", 2, (3.0, 1.5), run, render, settings=settings, alone=True,
    left_out=without_comfy,
)  # fmt: skip
