"""What the report shows of continued training and of another resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...ablation import BASE
from ...summary import ratio
from ..section import Claim, Line, Plot, Section, Table, Text, shown
from ..stage import Result
from .heavy_shown import held_out_loss, less, over

KINDS = {"samples": "with guidance", "unguided": "without guidance"}
_OURS = "diff2flow"
_OTHERS = (BASE, "diffusion", "flow_matching")
_NOTHING_NEW = (
    "Why the base is not beaten everywhere, as we understand it: the prior was trained on digits like these and on"
    " nothing else, so that more of them has little to teach. The paper's SD 1.5 goes on with LAION-Aesthetics, a"
    " selection of better pictures, and is judged by COCO, which neither was trained for."
)
_TABLES = (
    ("frechet_features", "Fréchet distance in the classifier's features (smaller is better)", "{:.2f}"),
    ("frechet_pixels", "Fréchet distance in pixels (smaller is better)", "{:.3f}"),
    ("accuracy", "Share read as the digit that was asked for", "{:.3f}"),
)


def continued(result: Result) -> Section:
    """Quality after more of the same, and whether it is the better for the flow."""
    setting = result["setting"]
    about = (
        f"Training goes on with digits like those the prior was trained on, at the same {setting['size']} px: LoRAs of"
        f" rank {setting['rank']}, {setting['steps']} steps of {setting['batch_size']}, rate"
        f" {setting['learning_rate']:g}. The paper samples in 25 steps and names no guidance scale; here are"
        f" {setting['cfg']:g} and 1."
    )
    plots = [_over_training(result, "continued"), held_out_loss(result["summary"], "continued_loss")]
    section = _section(result, about, plots)
    compared = _compared(result["summary"], setting["sample_steps"][0])
    lacking = any(_verdict(*cells) < 1 for other, _, *cells in compared if other == BASE and cells[0]["seeds"] > 1)
    return replace(section, parts=(*section.parts, Text(_NOTHING_NEW))) if lacking else section


def resolution(result: Result) -> Section:
    """Quality at another size, over the training."""
    setting = result["setting"]
    about = (
        f"The prior knows 64 px, and learns {setting['size']} px: LoRAs of rank {setting['rank']}, {setting['steps']}"
        f" steps of {setting['batch_size']}, rate {setting['learning_rate']:g}. The base is sampled at the new size as"
        f" it is. Guidance {setting['cfg']:g} and 1."
    )
    return _section(
        result, about, [_over_training(result, "resolution"), held_out_loss(result["summary"], "resolution_loss")]
    )


def last_loss(cells: Mapping[str, Any]) -> Mapping[str, Any]:
    """The held-out flow matching loss after the last step."""
    steps = [int(key.split("/")[1]) for key in cells if key.startswith("validation/")]
    return cells[f"validation/{max(steps)}"]


def _section(result: Result, about: str, plots: Sequence[Plot]) -> Section:
    summary, counts = result["summary"], result["setting"]["sample_steps"]
    tables = [_table(summary, counts, number, title, form) for number, title, form in _TABLES]
    rows = [(method, shown(last_loss(cells), "{:.4f}")) for method, cells in summary.items()]
    losses = Table("Held-out flow matching loss after the training", ("method", "loss"), rows)
    return Section(_claims(summary, counts[0]), (Text(about), *plots, *tables, losses, Text(_found(result))))


def _table(summary: Mapping[str, Any], counts: Sequence[int], number: str, title: str, form: str) -> Table:
    columns = [(kind, count) for kind in KINDS for count in counts]
    head = ["method", *(f"{KINDS[kind]}, {count} steps" for kind, count in columns), "seeds"]
    rows = []
    for method, cells in summary.items():
        found = [cells[f"{kind}/{count}/{number}"] for kind, count in columns]
        rows.append((method, *(shown(cell, form) for cell in found), str(found[0]["seeds"])))
    return Table(title, head, rows)


def _compared(summary: Mapping[str, Any], count: int) -> list[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Other method, kind of samples, its cell and ours, of the Fréchet distances."""
    found = []
    for kind in KINDS:
        key = f"{kind}/{count}/frechet_features"
        found += [(other, kind, summary[other][key], summary[_OURS][key]) for other in _OTHERS if other in summary]
    return found


def _claims(summary: Mapping[str, Any], count: int) -> list[Claim]:
    claims = []
    for other, kind, theirs, ours in _compared(summary, count):
        text = f"Fréchet distance of {other} over diff2flow's, {count} steps, {KINDS[kind]}"
        claims.append(less(text, theirs, ours, main=kind == "samples" and other != "flow_matching"))
    return claims


def _found(result: Result) -> str:
    """What the distances say, and what the paper's own weighting changes."""
    summary, count = result["summary"], result["setting"]["sample_steps"][0]
    compared = _compared(summary, count)
    if compared[0][3]["seeds"] < 2:
        return "One seed: no verdict."
    lines = []
    for verdict, words in ((1, "worse than diff2flow"), (0, "no different by more than the deviation"), (-1, "better")):
        named = [f"{other} {KINDS[kind]}" for other, kind, *cells in compared if _verdict(*cells) == verdict]
        if named:
            lines.append(f"{words}: {', '.join(named)}")
    tried = _shorter(result) + _variants(summary, count)
    return f"In Fréchet distance, {count} steps, {'; '.join(lines)}.{_losses(summary)}{tried}"


def _verdict(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> int:
    """1: theirs is larger by more than the deviation; -1: smaller; 0: neither."""
    found, spread = ratio(theirs, ours)
    return 1 if found - spread > 1 else -1 if found + spread < 1 else 0


def _losses(summary: Mapping[str, Any]) -> str:
    theirs, ours = (last_loss(summary[method]) for method in ("diffusion", _OURS))
    word = {1: "lower than", -1: "higher than", 0: "the same, within the deviation, as"}[_verdict(theirs, ours)]
    return (
        f" The held-out flow matching loss after diff2flow is {word} after diffusion training"
        f" ({shown(ours, '{:.4f}')} and {shown(theirs, '{:.4f}')}): it is what diff2flow minimises."
    )


def _shorter(result: Result) -> str:
    """The base's Fréchet distances over ours after each part of the training but the last."""
    summary, setting = result["summary"], result["setting"]
    count, part = setting["sample_steps"][0], setting["steps"] // setting["parts"]
    text = ""
    for step in range(part, setting["steps"], part):
        parts = []
        for kind, words in KINDS.items():
            key = f"{kind}/{count}/frechet_features"
            parts.append(f"{over(summary[BASE][key], summary[_OURS][f'after/{step}/{key}'])} {words}")
        text += (
            f" Tried, too: {step} steps; the base's Fréchet distance over diff2flow's is then {' and '.join(parts)}."
        )
    return text


def _variants(summary: Mapping[str, Any], count: int) -> str:
    """Of each other loss setting of ours: its Fréchet distances over ours."""
    text = ""
    for method in (name for name in summary if name.startswith(f"{_OURS}, ")):
        keys = {kind: f"{kind}/{count}/frechet_features" for kind in KINDS}
        parts = [f"{over(summary[method][key], summary[_OURS][key])} {KINDS[kind]}" for kind, key in keys.items()]
        text += f" Tried, too: {method}; its Fréchet distance over diff2flow's is {' and '.join(parts)}."
    return text


def _over_training(result: Result, name: str) -> Plot:
    """Fréchet distance by training step, from the base's on; naive flow matching does not begin there."""
    summary, count = result["summary"], result["setting"]["sample_steps"][0]
    lines = []
    for kind in KINDS:
        number = f"{kind}/{count}/frechet_features"
        for method in filter(summary.__contains__, (_OURS, "diffusion", "flow_matching")):
            points = {} if method == "flow_matching" else {0: summary[BASE][number]}
            for key, cell in summary[method].items():
                if key.startswith("after/") and key.endswith(number):
                    points[int(key.split("/")[1])] = cell
            x, found = sorted(points), [points[step] for step in sorted(points)]
            means, spreads = ([cell[name] for cell in found] for name in ("mean", "deviation"))
            lines.append(Line(f"{method}, {KINDS[kind]}", x, means, spreads, dashed=kind == "unguided"))
    return Plot(
        name, f"Quality at {result['setting']['size']} px", "training step", "Fréchet distance", lines,
        note=f"{count} steps",
    )  # fmt: skip
