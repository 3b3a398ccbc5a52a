"""Findings of a card become a result that is committed, and the tables of docs/settings.md.

    python -m diff2flow_nodes.bench.gpu.results FINDINGS.jsonl ...

Writes bench/results/gpu_CARD.json from the findings of one card, and anew what docs/settings.md says of all cards
that there are results of. Without findings only the page is written. A number stands in a table only if it was
measured, or follows from one that is named beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs import write_json
from .findings import read_lines

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "settings.md"
BEGIN = "<!-- Written by `python -m diff2flow_nodes.bench.gpu.results`; not by hand. -->"
END = "<!-- The end of what it writes. -->"
UNMEASURED = """\
No card has been measured yet: **all times are unmeasured** until `make gpu` has run on one (eight minutes; it needs an
NVIDIA card and no checkpoint). To contribute yours, run it, then `python -m diff2flow_nodes.bench.gpu.results
.cache/gpu/findings.jsonl`, and send in the two files that this changes."""
MEASURED = "measured"
_TEACHER_STEPS, _PAIRS = 40, 10_000
_RECIPES = (
    ("a style: {steps:,} steps of *{preset}*, batch {batch}", "light", 1, False, 3000),
    ("a style: {steps:,} steps of *{preset}*, batch {batch}", "light", 4, False, 750),
    ("a style: {steps:,} steps of *{preset}*, batch {batch}, checkpointing", "light", 4, True, 750),
    ("training on pairs: {steps:,} steps of *{preset}*, batch {batch}, checkpointing", "paper-small", 4, True, 5000),
)
"""Title, preset, batch, checkpointing and steps of runs whose hours follow from a measured step."""
_STEP_PHASES = ("steps_sd15", "steps_sdxl", "steps_more")
Card = Mapping[str, Any]
"""A result: "card", "about", "findings", "failed", "skipped"."""


def card_result(files: Sequence[Path]) -> dict[str, Any]:
    """The result of one card, from the findings of one run or more.

    Raises:
        ValueError: the findings are of no card, or of several.
    """
    lines = [line for path in files for line in read_lines(path)]
    about = [line for line in lines if line["phase"] == "environment" and line.get("card")]
    cards = sorted({line["card"] for line in about})
    if len(cards) != 1:
        raise ValueError(f"the findings must be of one card, and are of {', '.join(cards) or 'none'}")

    def of(kind: str) -> list[dict[str, Any]]:
        return [_plain(line) for line in lines if line["kind"] == kind]

    done = {line["phase"] for line in of("finding")}
    return {
        "card": cards[0],
        "about": _plain(about[-1]),
        "findings": [line for line in of("finding") if line["phase"] != "environment"],
        "failed": [line for line in of("failed") if line["what"] not in done],
        "skipped": [line for line in of("skipped") if line["what"] not in done],
    }


def file_name(card: str) -> str:
    """Of a card's result."""
    return f"gpu_{re.sub('[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


def written(page: str, cards: Sequence[Card]) -> str:
    """A page whose part between BEGIN and END speaks of these cards.

    Raises:
        ValueError: the page has no such part.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no part to be written: its two comments are missing")
    said = "\n\n".join(_section(card) for card in cards) if cards else UNMEASURED
    return f"{before}{BEGIN}\n\n{said}\n\n{END}{after}"


def _section(card: Card) -> str:
    """All tables of a card that there are numbers for."""
    parts = [f"### {card['card']}", _about(card)]
    parts += [table for make in (_times, _steps, _promises, _others) if (table := make(card))]
    return "\n\n".join(parts)


def _about(card: Card) -> str:
    about, failed = card["about"], [line["what"] for line in card["failed"]]
    file = f"bench/results/{file_name(card['card'])}"
    text = f"torch {about.get('torch')}, random weights in fp16; `{file}` has everything."
    left = [line["what"] for line in card["skipped"]]
    text += f" Failed: {', '.join(failed)}." if failed else ""
    return text + (f" Not measured: {', '.join(left)}." if left else "")


def _times(card: Card) -> str:
    """What takes how long, and how that is known."""
    rows = [*_step_times(card), *_pair_times(card)]
    return _table("How long it takes", ("what", "time", "known from"), rows)


def _step_times(card: Card) -> Iterator[tuple[str, ...]]:
    found = {_step_key(line): line for line in _of(card, _STEP_PHASES, "ours_seconds")}
    for title, preset, batch, checkpointing, steps in _RECIPES:
        for family in ("SD1.5", "SDXL"):
            line = found.get((family, preset, batch, checkpointing, "bf16"))
            if line is None:
                continue
            each = f"{_digits(line['ours_seconds'])} s a step"
            name = f"{family}, {line['side']} px, {title.format(preset=preset, batch=batch, steps=steps)}"
            yield name, _duration(steps * line["ours_seconds"]), f"extrapolated from {each}, {MEASURED}"


def _pair_times(card: Card) -> Iterator[tuple[str, ...]]:
    for line in {line["family"]: line for line in _of(card, ("pairs",), "pairs_a_minute")}.values():
        what = f"{line['family']}, {line['side']} px, pairs of {line['steps']} teacher steps, {line['batch']} a call"
        a_minute = f"{_digits(line['pairs_a_minute'])} pairs a minute"
        yield what, a_minute, MEASURED
        seconds = 60 * _PAIRS * _TEACHER_STEPS / line["steps"] / line["pairs_a_minute"]
        many = f"{line['family']}, {line['side']} px, {_PAIRS:,} pairs of {_TEACHER_STEPS} teacher steps"
        yield many, _duration(seconds), f"extrapolated from {a_minute} of {line['steps']} teacher steps, {MEASURED}"


def _steps(card: Card) -> str:
    """Measured steps, and their memory beside the estimate."""
    rows = []
    for line in {_step_key(line): line for line in _of(card, _STEP_PHASES, "ours_seconds")}.values():
        peak = line.get("peak_bytes")
        rows.append(
            (line["family"], str(line["side"]), line["preset"], str(line["batch"]), _on(line["checkpointing"]),
             line["precision"], _number(line.get("ours_seconds")), _number(line.get("ratio")),
             _number(None if peak is None else peak / 2**30), _number(line.get("peak_over_estimate")))
        )  # fmt: skip
    head = ("network", "px", "preset", "batch", "checkpointing", "products", "a step, s", "over the bare step",
            "peak, GiB", "over the estimate")  # fmt: skip
    return _table("A training step (measured)", head, rows)


def _promises(card: Card) -> str:
    rows = []
    for line in _of(card, ("cards",), "card_gib"):
        found = "fits" if line.get("fits") else f"does not fit: {line.get('said', '')}"
        if line.get("in_smaller_calls"):
            found = f"fits in smaller calls: {line['in_smaller_calls']}"
        what = f"{line['family']}, {line['side']} px, {line['preset']}, batch {line['batch']}"
        rows.append((f"{line['card_gib']} GB", what, _on(line["checkpointing"]), found))
    title = "On smaller cards, pretended on this one (measured)"
    return _table(title, ("card", "what", "checkpointing", "whole run"), rows)


def _others(card: Card) -> str:
    rows = [
        (f"image in fp16 beside fp32, {line['steps']} steps, mean difference of 255", _number(line["mean_of_255"]))
        for line in _of(card, ("images",), "mean_of_255")
    ]
    for line in _of(card, ("comfy", "comfy_plain"), "median_ratio"):
        vram = "dynamic VRAM" if line["phase"] == "comfy" else "without dynamic VRAM, 8 GB pretended"
        rows.append((f"{line['of']} in ComfyUI over KSampler ({vram})", _number(line["median_ratio"].get("ours"))))
    rows += [
        (f"pairs, of the bare calls' throughput, {line['family']}", _number(line["share_of_bare_throughput"]))
        for line in _of(card, ("pairs",), "share_of_bare_throughput")
    ]
    for line in _of(card, ("variants", "variants_pairs", "compiled"), "median_ratio"):
        rows += [
            (f"{line['of']}: {way}, over what it is", _number(ratio))
            for way, ratio in line["median_ratio"].items()
            if way != "as it is"
        ]
    return _table("What else was measured", ("what", "value"), rows)


def _of(card: Card, phases: Sequence[str], key: str) -> list[Mapping[str, Any]]:
    """The findings of phases that have a value."""
    return [line for line in card["findings"] if line["phase"] in phases and line.get(key) is not None]


def _step_key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("family", "preset", "batch", "checkpointing", "precision"))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("at", "kind")}


def _on(on: bool) -> str:
    return "on" if on else "off"


def _number(value: float | None) -> str:
    return "–" if value is None else _digits(value)


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.5f}".rstrip("0") if "e" in text else text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{_digits(seconds / 3600)} h"


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = print) -> int:
    """Writes the result and the page; 2 where the findings are of no card."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("findings", nargs="*", type=Path, help="of one card; later files go on from earlier ones")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (bench/results)")
    parser.add_argument("--page", type=Path, default=PAGE, help="that has the tables (docs/settings.md)")
    given = parser.parse_args(arguments)
    if given.findings:
        try:
            result = card_result(given.findings)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        path = given.results / file_name(result["card"])
        write_json(path, result)
        say(f"written: {path}")
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(given.results.glob("gpu_*.json"))]
    given.page.write_text(written(given.page.read_text(encoding="utf-8"), cards), encoding="utf-8")
    say(f"written: {given.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
