"""Depth by how many parameters the LoRA has: the shape of the paper's Table 4."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ... import depth_quality
from ..section import Claim, Line, Plot, Section, Table, Text, shown
from ..stage import Context, Result, Stage, of_seeds
from .heavy import depth_setting

METHOD = "diff2flow"
_COUNT = 2
"""Steps that are compared."""


def ranks(context: Context) -> list[int]:
    """Ranks, of every layer; that of the stage before is among them and is not trained again."""
    return [4, 16] if context.quick else [2, 16, 64]


def run(context: Context) -> Result:
    """The errors of Diff2Flow by rank, for each seed."""
    setting, found = depth_setting(context), {}
    for rank in ranks(context):
        known = rank == setting.rank
        out = context.folder("depth_quality") if known else context.folder("depth_sizes") / f"rank_{rank}"
        seeds = list(context.seeds)
        # The objectives that the stage before has run stay in its summary.
        chosen = setting if known else replace(setting, rank=rank, parts=1, sample_steps=(10, _COUNT))
        path = depth_quality.report(context.own_models(), out, chosen, [METHOD], seeds, context.device)
        found[str(rank)] = json.loads(path.read_text(encoding="utf-8"))["summary"][METHOD]
    numbers = {
        f"rank {rank}, AbsRel, {_COUNT} steps": of_seeds(cells[f"steps/{_COUNT}/abs_rel"], "smaller", 0.005)
        for rank, cells in found.items()
    }
    return {"by_rank": found, "ensemble": setting.ensemble, "steps": setting.steps, "numbers": numbers}


def render(result: Result) -> Section:
    """Errors over the trained parameters."""
    by_rank = result["by_rank"]
    rows = [_row(rank, cells) for rank, cells in by_rank.items()]
    least, most = list(by_rank.values())[0], list(by_rank.values())[-1]
    key = f"steps/{_COUNT}/abs_rel"
    ratio = least[key]["mean"] / most[key]["mean"]
    holds = ratio > 1.0 if least[key]["seeds"] > 1 else None
    text = f"AbsRel in {_COUNT} steps of the smallest LoRA over the largest's: more parameters, better depth"
    sizes = [cells["trained_parameters"]["mean"] / 1e6 for cells in by_rank.values()]
    lines = [
        Line(name, sizes, [cells[key]["mean"] for cells in by_rank.values()],
             [cells[key]["deviation"] for cells in by_rank.values()])
        for name, key in ((f"{_COUNT} steps", key), (f"ensemble of {result['ensemble']}", "ensemble/abs_rel"))
    ]  # fmt: skip
    plot = Plot("depth_sizes", "Depth by trained parameters", "million parameters", "AbsRel", lines, log_x=True,
                free_y=True)  # fmt: skip
    head = ("rank", "trained", f"AbsRel, {_COUNT} steps", f"delta1, {_COUNT} steps", "AbsRel, 10 steps",
            f"AbsRel, ensemble of {result['ensemble']}")  # fmt: skip
    note = Text(
        f"Diff2Flow, {result['steps']} training steps, LoRAs of one rank on every layer, first and last layer in full."
        " The paper's Table 4: AbsRel 6.9 with 62 M trained parameters, 5.9 with 222 M, 5.7 with all."
    )
    return Section([Claim(text, f"{ratio:.3f}", "> 1", holds, main=True)], (note, Table("", head, rows), plot))


def _row(rank: str, cells: Mapping[str, Any]) -> tuple[str, ...]:
    keys = (f"steps/{_COUNT}/abs_rel", f"steps/{_COUNT}/delta1", "steps/10/abs_rel", "ensemble/abs_rel")
    size = cells["trained_parameters"]["mean"] / 1e6
    return (rank, f"{size:.2f} M", *(shown(cells[key], "{:.4f}") for key in keys))


def _settings(context: Context) -> Mapping[str, Any]:
    return {**asdict(depth_setting(context)), "ranks": ranks(context)}


STAGE = Stage(
    "depth_sizes", "Depth by trained parameters (Table 4)", 3, (10.0, 0.5), run, render, settings=_settings,
    needs=("depth_quality",), seeded=True,
)  # fmt: skip
