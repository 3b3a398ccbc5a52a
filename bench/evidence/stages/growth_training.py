"""What a training step costs over the bare forward, backward and AdamW, headless: seconds and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ...costs import interleaved, medians, peak_bytes, ratios, restarted_peak
from ...random_network import RandomNetwork, call_unet
from ...training_steps import ITEMS, RANK, Material, StepClock, bare, latents, ours
from ..section import Claim, Section, Table, Text
from ..stage import Context, Result, Stage, number

GOAL = 1.10
"""Of seconds and of memory, at the largest batch."""
_PROCESSES = 3
_SIZE = {False: 64, True: 320}


def scale(context: Context) -> dict[str, Any]:
    """Batches at 8 × 8 latents, sides at batch 4, timed steps and rounds."""
    if context.quick:
        return {"batches": [1, 8], "sides": [16], "steps": 1, "rounds": 2, "processes": 1}
    sides = [16, 32] + ([64] if context.full else [])
    return {"batches": [1, 4, 16], "sides": sides, "steps": 4, "rounds": 4, "processes": _PROCESSES}


def run(context: Context) -> Result:
    """Seconds a step of both ways, in turns, and their peak memory in processes of their own."""
    wanted, folder = scale(context), context.folder("growth_training")
    sizes = [(batch, 8) for batch in wanted["batches"]] + [(4, side) for side in wanted["sides"]]
    load = partial(_loaded, folder, context.full, context.device)
    cases = [_case(load(side), batch, side, wanted["steps"], wanted["rounds"], context.device) for batch, side in sizes]
    batch, side = sizes[-1]
    memory = _memory(folder, context, batch, side, wanted["processes"])
    numbers = {f"step over bare, batch {case['batch']}, side {case['side']}": _number(case) for case in cases}
    numbers["memory over bare"] = number(memory["over_bare"], "smaller", memory["spread"], 0.05, timed=True)
    return {"cases": cases, "memory": memory, "rank": RANK, "numbers": numbers}


def _loaded(folder: Path, full: bool, device: str, side: int) -> Material:
    random = RandomNetwork(folder, _SIZE[full], full, device)
    return Material(random.model, random.texts(ITEMS), latents(side))


def _way(name: str, material: Material, steps: int, batch: int) -> Callable[[], None]:
    if name == "bare":
        return partial(bare, material, call_unet, steps, batch)
    return partial(ours, material, steps, batch)


def _case(material: Material, batch: int, side: int, steps: int, rounds: int, device: str) -> dict[str, Any]:
    def timed(name: str) -> float:
        with StepClock(device) as clock:
            _way(name, material, steps + 1, batch)()
        return clock.seconds()

    seconds = interleaved({name: partial(timed, name) for name in ("bare", "ours")}, rounds)
    return {"batch": batch, "side": side, "seconds": medians(seconds), **ratios(seconds, "bare")}


def _memory(folder: Path, context: Context, batch: int, side: int, processes: int) -> dict[str, Any]:
    """Peak bytes of both ways over the loaded model, each in fresh processes."""
    peaks = {
        name: [_fresh(_peak, name, folder, context.full, context.device, batch, side) for _ in range(processes)]
        for name in ("bare", "ours")
    }
    least = statistics.median(peaks["bare"])
    shares = [each / least for each in peaks["ours"]]
    spread = max(shares) - min(shares)
    return {"bytes": peaks, "batch": batch, "side": side, "over_bare": statistics.median(shares), "spread": spread}


def _fresh(function: Callable[..., int], *given: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def _peak(name: str, folder: Path, full: bool, device: str, batch: int, side: int) -> int:
    """Peak bytes of one way in this process."""
    import peft  # noqa: F401  (its own size is no part of any way)

    torch.set_num_threads(1)
    material, cuda = _loaded(folder, full, device, side), device != "cpu"
    before = restarted_peak(cuda)
    _way(name, material, 3, batch)()
    return peak_bytes(cuda) - before


def _number(case: dict[str, Any]) -> dict[str, Any]:
    low, _, high = case["ratio_quartiles"]["ours"]
    return number(case["median_ratio"]["ours"], "smaller", high - low, 0.1, timed=True)


def render(result: Result) -> Section:
    """Both ways by size, and their memory."""
    rows = [_row(case) for case in result["cases"]]
    largest, memory = result["cases"][-1], result["memory"]
    ratio, size = (
        largest["median_ratio"]["ours"],
        f"batch {largest['batch']}, latents {largest['side']} × {largest['side']}",
    )
    low, _, high = largest["ratio_quartiles"]["ours"]
    claims = [
        Claim(f"our training step over the bare one, {size} (headless)",
              f"{ratio:.3f} ({low:.3f} to {high:.3f})", f"≤ {GOAL}", ratio <= GOAL, main=True),
        Claim(f"peak memory of our training over the bare steps', {size} (headless)",
              f"{memory['over_bare']:.3f} ± {memory['spread']:.3f}", f"≤ {GOAL}", memory["over_bare"] <= GOAL),
    ]  # fmt: skip
    peaks = [f"{name} {statistics.median(each) / 1e6:.0f} MB" for name, each in memory["bytes"].items()]
    note = Text(
        f"LoRA of rank {result['rank']} on every layer of a UNet of random weights; the bare step is forward, backward"
        f" and AdamW on one fixed batch. Peak over the loaded model, {size}: {', '.join(peaks)}."
    )
    head = ("batch", "latent side", "bare, s", "ours, s", "ratio", "quartiles")
    return Section(claims, (note, Table("Seconds a step, in turns", head, rows)))


def _row(case: dict[str, Any]) -> tuple[str, ...]:
    seconds, (low, _, high) = case["seconds"], case["ratio_quartiles"]["ours"]
    times = (f"{seconds['bare']:.4f}", f"{seconds['ours']:.4f}", f"{case['median_ratio']['ours']:.3f}")
    return (str(case["batch"]), str(case["side"]), *times, f"{low:.3f} to {high:.3f}")


STAGE = Stage(
    "growth_training", "A training step over the bare one", 2, (4.0, 0.5), run, render, settings=scale, alone=True,
)  # fmt: skip
