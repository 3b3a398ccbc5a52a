"""How the cost of sampling over the bare network calls grows: with the batch, the latent's side and the steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ....nodes import NODE_CLASS_MAPPINGS
from ...costs import interleaved, medians, ratios, seconds_on
from ...random_network import RandomNetwork, call_unet
from ..section import Claim, Line, Plot, Section, Table, Text
from ..stage import Context, Result, Stage, number

CFG, STEPS = 4.0, 4
_WIDTH = 64
_FEW_ROUNDS = 3
_GOAL = 1.05
"""Of the ratio at the largest batch and the largest latent, where the network is more than overhead."""


def scale(context: Context) -> dict[str, Any]:
    """Batches at 8 × 8 latents, sides and steps at batch 1, rounds, and sides of one step and few rounds."""
    if context.quick:
        quick = {"batches": [1, 4, 16], "sides": [8, 16, 32], "steps": [2, 8], "rounds": 3}
        return {**quick, "one_step": [], "width": _WIDTH}
    size = {"one_step": [], "width": 320} if context.full else {"one_step": [128], "width": _WIDTH}
    sides, steps = [8, 16, 32, 64, 128], [2, 4, 8, 16, 32]
    return {"batches": [1, 2, 4, 8, 16, 32], "sides": sides, "steps": steps, "rounds": 5, **size}


def run(context: Context) -> Result:
    """Seconds of ours and of the bare calls, in turns, for each size."""
    wanted = scale(context)
    measured = Bench(context.folder("growth_sampling"), wanted["width"], context.full, context.device)
    found = {name: [measured.case(*size) for size in each] for name, each in sizes(wanted).items()}
    return {"cases": found, "parameters": measured.parameters, "numbers": _numbers(found)}


def sizes(wanted: dict[str, Any]) -> dict[str, list[tuple[int, int, int, int]]]:
    """Batch, side, steps and rounds of each case, by what grows.

    Args:
        wanted: see `scale`.
    """
    rounds = wanted["rounds"]
    lengths = {side: (1, _FEW_ROUNDS) if side in wanted["one_step"] else (STEPS, rounds) for side in wanted["sides"]}
    return {
        "batch": [(batch, 8, STEPS, rounds) for batch in wanted["batches"]],
        "side": [(1, side, *length) for side, length in lengths.items()],
        "steps": [(1, 8, steps, rounds) for steps in wanted["steps"]],
    }


class Bench:
    """A network of random weights, loaded headless.

    Args:
        folder: of the checkpoint.
        width: channels of its first level.
        full: SD1.5's own size, four levels of two blocks.
        device: that it is on.

    Attributes:
        parameters: of the network.
    """

    def __init__(self, folder: Path, width: int, full: bool, device: str) -> None:
        self._random = RandomNetwork(folder, width, full, device)
        self._model, self._texts = self._random.model, self._random.texts(2)
        self.parameters = self._random.parameters

    def case(self, batch: int, side: int, steps: int, rounds: int) -> dict[str, Any]:
        """Median seconds of both ways, the median of their ratios, and quartiles.

        Args:
            batch, side, steps: of the sampling.
            rounds: of both in turn.
        """
        latent = {"samples": torch.zeros(batch, 4, side, side)}
        positive, negative = ([[text, {}]] for text in self._texts)
        sample = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]().sample
        ways = {
            "ours": partial(sample, self._model, positive, negative, latent, 0, steps, CFG, "euler", 1.0, "auto"),
            "bare": partial(self._bare, batch, side, steps),
        }
        timed = seconds_on(self._random.device.type)
        seconds = interleaved({name: timed(way) for name, way in ways.items()}, rounds)
        extra = [1e3 * (a - b) / steps for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
        sizes = {"batch": batch, "side": side, "steps": steps}
        return {**sizes, "seconds": medians(seconds), "extra_ms_a_step": _median(extra), **ratios(seconds, "bare")}

    @torch.inference_mode()
    def _bare(self, batch: int, side: int, steps: int) -> None:
        """The network's calls with both prompts in one, and nothing else."""
        x = torch.zeros(2 * batch, 4, side, side, device=self._random.device, dtype=self._random.dtype)
        context = torch.cat(self._texts).repeat_interleave(batch, 0).to(x)
        for tau in torch.linspace(999, 0, steps, device=self._random.device):
            call_unet(self._random.network, x, tau.expand(2 * batch), context)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    numbers = {}
    for name, cases in found.items():
        for case in cases:
            low, _, high = case["ratio_quartiles"]["ours"]
            label = f"ours over bare, {name} {case[name]}"
            numbers[label] = number(case["median_ratio"]["ours"], "smaller", high - low, 0.1, timed=True)
    return numbers


def render(result: Result) -> Section:
    """A table and a plot for each of batch, side and steps."""
    titles = {"batch": "images in a batch (latents 8 × 8)", "side": "side of the latents (batch 1)",
              "steps": "steps (batch 1, latents 8 × 8)"}  # fmt: skip
    rows = [_row(titles[name], name, case) for name, cases in result["cases"].items() for case in cases]
    largest = {name: result["cases"][name][-1] for name in ("batch", "side")}
    claims = [_claim(name, case) for name, case in largest.items()]
    note = Text(
        f"Headless, a UNet of {result['parameters'] / 1e6:.1f} M random weights, CFG {CFG:g}; the bare calls are the"
        " network with both prompts in one batch and nothing else. On so small a network a step's fixed costs show."
        f"{_in_one_step(result['cases']['side'])}"
    )
    lines = [
        Line(f"over {name}", [case[name] for case in cases], [case["median_ratio"]["ours"] for case in cases])
        for name, cases in result["cases"].items()
    ]
    plot = Plot("growth_sampling", "Sampling over the bare calls", "batch, latent side or steps",
                "seconds over those of the bare calls", lines, log_x=True)  # fmt: skip
    head = ("what grows", "size", "ours, s", "bare calls, s", "ratio", "quartiles", "more, ms a step")
    return Section(claims, (note, Table("", head, rows), plot))


def _in_one_step(cases: list[dict[str, Any]]) -> str:
    """Which sides were not sampled in as many steps as the others."""
    sides = [str(case["side"]) for case in cases if case["steps"] == 1]
    return f" Side {', '.join(sides)} is sampled in one step, {_FEW_ROUNDS} rounds." if sides else ""


def _row(title: str, name: str, case: dict[str, Any]) -> tuple[str, ...]:
    seconds, (low, _, high) = case["seconds"], case["ratio_quartiles"]["ours"]
    times = (f"{seconds['ours']:.4f}", f"{seconds['bare']:.4f}", f"{case['median_ratio']['ours']:.3f}")
    return (title, str(case[name]), *times, f"{low:.3f} to {high:.3f}", f"{case['extra_ms_a_step']:.2f}")


def _claim(name: str, case: dict[str, Any]) -> Claim:
    ratio, (low, _, high) = case["median_ratio"]["ours"], case["ratio_quartiles"]["ours"]
    text = f"Diff2Flow Sampler over the bare network calls, {name} {case[name]} (headless)"
    return Claim(text, f"{ratio:.3f} ({low:.3f} to {high:.3f})", f"≤ {_GOAL}", ratio <= _GOAL)


STAGE = Stage(
    "growth_sampling",
    "How the cost of sampling grows",
    2,
    (7.0, 0.7),
    run,
    render,
    settings=scale,
    alone=True,
)
