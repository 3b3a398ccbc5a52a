"""Compares two result files: what got worse by more than the spread explains."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .store import FORMAT

_DEVIATIONS = 2.0
Number = Mapping[str, Any]


def compare(before: Path, after: Path) -> tuple[list[str], list[str]]:
    """Lines of what was found, and the names of the numbers that got worse.

    A number is worse if it changed for the worse by more than 2 sqrt(d1² + d2²), d the standard deviations, and by
    more than its floor. Seconds and bytes count only between equal machines.

    Args:
        before, after: two evidence.json.

    Raises:
        ValueError: a file that is none, or that two runs of different kinds made.
    """
    one, two = read_results(before), read_results(after)
    if one["kind"] != two["kind"]:
        raise ValueError(
            f"{before} was measured by a {one['kind']} run and {after} by a {two['kind']} one: measure both alike"
        )
    lines, worse = [], []
    for stage in sorted({*one["stages"], *two["stages"]}):
        for line, name in _stage(stage, one["stages"].get(stage), two["stages"].get(stage)):
            lines.append(line)
            worse += [name] if name else []
    lines.append(f"{len(worse)} worse beyond the spread{': ' + ', '.join(worse) if worse else ''}")
    return lines, worse


def read_results(path: Path) -> dict[str, Any]:
    """An evidence.json.

    Raises:
        ValueError: a file that is none, or one of another format.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give an evidence.json of 'bench'") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); give an evidence.json of 'bench'") from error
    if not isinstance(found, dict) or not {"format", "kind", "stages"} <= set(found):
        raise ValueError(f"{path} is JSON, but no result of 'bench'; give an evidence.json")
    if found["format"] != FORMAT:
        raise ValueError(f"{path} has format {found['format']}, this version reads {FORMAT}; measure that commit anew")
    return found


def _stage(stage: str, one: Mapping[str, Any] | None, two: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """A line for everything about a stage, and the name of what got worse or ""."""
    if one is None or two is None:
        yield f"{stage}: only in the {'second' if one is None else 'first'}", ""
    elif "result" not in one or "result" not in two:
        yield from _without_result(stage, one, two)
    elif one["settings"] != two["settings"]:
        yield f"{stage}: measured with other settings, not compared", ""
    else:
        same_machine = one["provenance"]["machine"] == two["provenance"]["machine"]
        first, second = (entry["result"].get("numbers", {}) for entry in (one, two))
        for name in sorted({*first, *second}):
            yield _number(f"{stage}/{name}", first.get(name), second.get(name), same_machine)


def _without_result(stage: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A stage that worked and then failed is a regression; others without result are only named."""
    states = [entry.get("error") or entry.get("left_out") or "done" for entry in (one, two)]
    broke = "result" in one and "error" in two
    yield f"{stage}: {states[0]} -> {states[1]}{', WORSE' if broke else ''}", stage if broke else ""


def _number(name: str, one: Number | None, two: Number | None, same_machine: bool) -> tuple[str, str]:
    if one is None or two is None:
        return f"{name}: only in the {'second' if one is None else 'first'}", ""
    change = two["value"] - one["value"]
    allowed = max(_DEVIATIONS * math.hypot(one["spread"], two["spread"]), one["floor"], two["floor"])
    line = f"{name}: {one['value']:.6g} -> {two['value']:.6g} (allowed ± {allowed:.3g})"
    if not one["better"] or (one["timed"] and not same_machine):
        return f"{line}, not judged{'' if not one['better'] else ': other machine'}", ""
    loss = change if one["better"] == "smaller" else -change
    if loss > allowed:
        return f"{line}, WORSE", name
    return f"{line}, {'better' if loss < -allowed else 'as before'}", ""
