"""What the report shows of depth by each objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ..section import Line, Plot, Section, Table, Text, shown
from ..stage import Result
from .compared import ONE_SEED, OURS, less, means, sorted_out, stepped, tried

_OTHERS = ("flow_matching", "diffusion")
_COUNTS = (2, 10)
_NEW_TO_ALL = (
    "Why naive flow matching is not beaten everywhere, as we understand it: alignment keeps what the prior knows, and"
    " this prior is trained for minutes; first and last layer are trained in full, and much of what the prior"
    " predicted has to be unlearned whatever it is asked for. With a prior that was trained for longer,"
    " and shorter and longer trainings of the LoRA, naive flow matching is behind:"
    " [results](results/depth_quality.md), [200 steps](results/depth_quality_200_steps.json)."
)


def depth(result: Result) -> Section:
    """AbsRel and delta1 by objective and steps, beside what needs no prior, and what was tried."""
    summary, setting = result["summary"], result["setting"]
    counts = setting["sample_steps"]
    drawn = {name: cells for name, cells in summary.items() if f"steps/{counts[0]}/abs_rel" in cells}
    plain = {name: cells for name, cells in summary.items() if name not in drawn}
    rows = [
        (name, shown(cells["abs_rel"], "{:.4f}"), shown(cells["delta1"], "{:.4f}")) for name, cells in plain.items()
    ]
    lines = [Line(name, counts, *means(cells, counts, "steps/{}/abs_rel")) for name, cells in drawn.items()]
    claims = [
        less(f"AbsRel of {other} over diff2flow's {where}", *cells, main=where == f"in {_COUNTS[0]} steps")
        for other in _OTHERS
        for where, *cells in _apart(drawn, other, OURS, _COUNTS)
    ]
    unbeaten = any(claim.holds is False for claim in claims[: len(_COUNTS)])  # those of flow matching come first
    return Section(
        claims,
        (
            Text(_found(drawn, setting)),
            *([Text(_NEW_TO_ALL)] if unbeaten else []),
            Plot("depth", "Depth by objective", "steps", "AbsRel", lines, log_x=True),
            stepped(drawn, counts, "steps/{}/abs_rel", "AbsRel (smaller is better)", "{:.4f}"),
            stepped(drawn, counts, "steps/{}/delta1", "delta1 (larger is better)", "{:.4f}"),
            Table("For scale", ("method", "AbsRel", "delta1"), rows),
        ),
    )


def _apart(drawn: Mapping[str, Any], one: str, other: str, counts: Sequence[int], prefix: str = "") -> list[Any]:
    """Where, one method's AbsRel and another's, for each step count."""
    key = f"{prefix}steps/{{}}/abs_rel"
    return [(f"in {count} steps", drawn[one][key.format(count)], drawn[other][key.format(count)]) for count in counts]


def _found(drawn: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """The verdict at all step counts, after a part of the training, and with other loss settings."""
    counts = setting["sample_steps"]
    if drawn[OURS][f"steps/{counts[0]}/abs_rel"]["seeds"] < 2:
        return ONE_SEED
    compared = [
        (f"{other} {where}", *cells) for other in _OTHERS for where, *cells in _apart(drawn, other, OURS, counts)
    ]
    text = (
        f"{setting['steps']} training steps of {setting['batch_size']}, LoRAs of rank {setting['rank']}. AbsRel by"
        f" steps of the sampling, {sorted_out(compared)}."
    )
    part = setting["steps"] // setting["parts"]
    for step, other in product(range(part, setting["steps"], part), _OTHERS):
        cells = _apart(drawn, other, OURS, _COUNTS, f"after/{step}/")
        text += tried(f"{step} training steps", f"AbsRel of {other} over diff2flow's", cells)
    for variant, other in product((name for name in drawn if name.startswith(f"{OURS}, ")), _OTHERS):
        text += tried(variant, f"AbsRel of {other} over its", _apart(drawn, other, variant, _COUNTS))
    return text
