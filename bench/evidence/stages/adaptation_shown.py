"""What the report shows of continued training, of another resolution and of a new style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ...ablation import BASE
from ..section import Claim, Line, Plot, Section, Table, Text, shown
from ..stage import Result
from .compared import ONE_SEED, OURS, less, over, sorted_out, tried, verdict

KINDS = {"samples": "with guidance", "unguided": "without guidance"}
_DIFFUSION = "diffusion"
_OTHERS = (BASE, _DIFFUSION, "flow_matching")
_NOTHING_NEW = (
    "Why the base is not beaten everywhere, as we understand it: the prior was trained on digits like these and on"
    " nothing else, so that more of them has little to teach. The paper's SD 1.5 goes on with LAION-Aesthetics, a"
    " selection of better pictures, and is judged by COCO, which neither was trained for."
)
_SAME_ERROR = (
    "Why diffusion is not beaten everywhere, as we understand it: both losses are the squared error of the same"
    " prediction, weighted differently over time, and both begin at what the prior predicts already; where the network"
    " is small and sees few pictures, which weights it had hardly shows in a Fréchet distance."
)
_FRECHET, _PIXELS = "frechet_features", "frechet_pixels"
_TABLES = (
    (_FRECHET, "Fréchet distance in the classifier's features (smaller is better)", "{:.2f}"),
    (_PIXELS, "Fréchet distance in pixels (smaller is better)", "{:.3f}"),
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
    return _section(result, about, "continued", {BASE: _NOTHING_NEW, _DIFFUSION: _SAME_ERROR})


def resolution(result: Result) -> Section:
    """Quality at another size, over the training."""
    setting = result["setting"]
    about = (
        f"The prior knows 64 px, and learns {setting['size']} px: LoRAs of rank {setting['rank']}, {setting['steps']}"
        f" steps of {setting['batch_size']}, rate {setting['learning_rate']:g}. The base is sampled at the new size as"
        f" it is. Guidance {setting['cfg']:g} and 1."
    )
    return _section(result, about, "resolution", {_DIFFUSION: _SAME_ERROR})


def ablation(result: Result) -> Section:
    """Quality in a style that the prior has never seen, over the training."""
    setting = result["setting"]
    about = (
        f"A style the prior has never seen, {setting['images']} pictures: LoRAs of rank {setting['rank']},"
        f" {setting['steps']} steps of {setting['batch_size']}, rate {setting['learning_rate']:g}. Guidance"
        f" {setting['cfg']:g} and 1."
    )
    return _section(result, about, "ablation", {BASE: _blind_to_style(result), _DIFFUSION: _SAME_ERROR})


def _blind_to_style(result: Result) -> str:
    """Why the base, which draws in another style, may be the nearer: the classifier sees no colours."""
    summary, count = result["summary"], result["setting"]["sample_steps"][0]
    pixels = [
        f"{over(*(summary[method][f'{kind}/{count}/{_PIXELS}'] for method in (BASE, OURS)))} {words}"
        for kind, words in KINDS.items()
    ]
    return (
        "Why the base is not beaten everywhere, as we understand it: the classifier sees shapes and no colours, so that"
        " its features say how well a digit is drawn and not in which style. The base draws as it was trained for long"
        " to, all in another style; a short training for a new style moves the colours first and costs some legibility."
        f" In pixels, where colours count, the base's distance over diff2flow's is {' and '.join(pixels)}."
    )


def last_loss(cells: Mapping[str, Any]) -> Mapping[str, Any]:
    """The held-out flow matching loss after the last step."""
    steps = [int(key.split("/")[1]) for key in cells if key.startswith("validation/")]
    return cells[f"validation/{max(steps)}"]


def _section(result: Result, about: str, name: str, why: Mapping[str, str]) -> Section:
    """All of a stage: why holds what is said of methods that are not beaten everywhere."""
    summary, counts = result["summary"], result["setting"]["sample_steps"]
    plots = [_over_training(result, name), _held_out_loss(summary, f"{name}_loss")]
    tables = [_table(summary, counts, number, title, form) for number, title, form in _TABLES]
    rows = [(method, shown(last_loss(cells), "{:.4f}")) for method, cells in summary.items()]
    losses = Table("Held-out flow matching loss after the training", ("method", "loss"), rows)
    words = [Text(text) for other, text in why.items() if _not_beaten(summary, counts[0], other)]
    return Section(_claims(summary, counts[0]), (Text(about), *plots, *tables, losses, Text(_found(result)), *words))


def _not_beaten(summary: Mapping[str, Any], count: int, name: str) -> bool:
    """Whether its Fréchet distance is somewhere no larger than ours; one seed says nothing."""
    return any(
        verdict(*cells) < 1 for other, _, *cells in _compared(summary, count) if other == name and cells[0]["seeds"] > 1
    )


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
        key = f"{kind}/{count}/{_FRECHET}"
        found += [(other, kind, summary[other][key], summary[OURS][key]) for other in _OTHERS if other in summary]
    return found


def _claims(summary: Mapping[str, Any], count: int) -> list[Claim]:
    claims = []
    for other, kind, theirs, ours in _compared(summary, count):
        text = f"Fréchet distance of {other} over diff2flow's, {count} steps, {KINDS[kind]}"
        claims.append(less(text, theirs, ours, main=kind == "samples"))
    return claims


def _found(result: Result) -> str:
    """What the distances say, and what the paper's own weighting changes."""
    summary, count = result["summary"], result["setting"]["sample_steps"][0]
    if any(cells["seeds"] < 2 for _, _, _, cells in _compared(summary, count)):
        return ONE_SEED
    compared = [(f"{other} {KINDS[kind]}", *cells) for other, kind, *cells in _compared(summary, count)]
    attempts = _shorter(result) + _variants(summary, count)
    return f"In Fréchet distance, {count} steps, {sorted_out(compared)}.{_losses(summary)}{attempts}"


def _losses(summary: Mapping[str, Any]) -> str:
    theirs, ours = (last_loss(summary[method]) for method in (_DIFFUSION, OURS))
    word, why = {
        1: ("lower than", ": it is what diff2flow minimises"),
        -1: ("higher than", ", though it is what diff2flow minimises"),
        0: ("the same, within the deviation, as", ", though it is what diff2flow minimises"),
    }[verdict(theirs, ours)]
    return (
        f" The held-out flow matching loss after diff2flow is {word} after diffusion training"
        f" ({shown(ours, '{:.4f}')} and {shown(theirs, '{:.4f}')}){why}."
    )


def _shorter(result: Result) -> str:
    """The others' Fréchet distances over ours after each part of the training but the last."""
    summary, setting = result["summary"], result["setting"]
    count, part, text = setting["sample_steps"][0], setting["steps"] // setting["parts"], ""
    for step, other in product(range(part, setting["steps"], part), (BASE, _DIFFUSION)):
        before = "" if other == BASE else f"after/{step}/"
        cells = [
            (words, summary[other][f"{before}{kind}/{count}/{_FRECHET}"],
             summary[OURS][f"after/{step}/{kind}/{count}/{_FRECHET}"])
            for kind, words in KINDS.items()
        ]  # fmt: skip
        text += tried(f"{step} steps", f"{other}'s Fréchet distance over diff2flow's", cells)
    return text


def _variants(summary: Mapping[str, Any], count: int) -> str:
    """Of each other loss setting of ours: the others' Fréchet distances over its."""
    text, variants = "", [name for name in summary if name.startswith(f"{OURS}, ")]
    for variant, other in product(variants, (BASE, _DIFFUSION)):
        cells = [
            (words, *(summary[name][f"{kind}/{count}/{_FRECHET}"] for name in (other, variant)))
            for kind, words in KINDS.items()
        ]
        text += tried(variant, f"{other}'s Fréchet distance over its", cells)
    return text


def _held_out_loss(summary: Mapping[str, Any], name: str) -> Plot:
    """The held-out flow matching loss over training, of all methods with more than one point.

    Args:
        summary: by method and number, "validation/<step>" among them.
        name: of the plot's file.
    """
    lines = []
    for method, cells in summary.items():
        points = sorted((int(key.split("/")[1]), cell) for key, cell in cells.items() if key.startswith("validation/"))
        if len(points) > 1:
            x, found = zip(*points, strict=True)
            lines.append(Line(method, x, [cell["mean"] for cell in found], [cell["deviation"] for cell in found]))
    return Plot(name, "Held-out flow matching loss", "training step", "loss", lines, log_y=True)


def _over_training(result: Result, name: str) -> Plot:
    """Fréchet distance by training step, from the base's on; naive flow matching does not begin there."""
    summary, count = result["summary"], result["setting"]["sample_steps"][0]
    lines = []
    for kind in KINDS:
        number = f"{kind}/{count}/{_FRECHET}"
        for method in filter(summary.__contains__, (OURS, _DIFFUSION, "flow_matching")):
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
