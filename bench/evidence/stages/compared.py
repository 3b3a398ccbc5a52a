"""Methods compared by their cells: claims, tables, and what comes out in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...summary import ratio
from ..section import Claim, Table, shown

Cell = Mapping[str, Any]
OURS = "diff2flow"
ONE_SEED = "One seed: no verdict."


def less(text: str, other: Cell, ours: Cell, main: bool = False) -> Claim:
    """That the other's mean is the larger by more than the deviation; one seed says nothing.

    Args:
        text, main: of the claim.
        other, ours: cells of the summary.
    """
    holds = verdict(other, ours) > 0 if ours["seeds"] > 1 else None
    return Claim(text, over(other, ours), "> 1 by more than its deviation", holds, main)


def over(one: Cell, other: Cell) -> str:
    """A ratio of means, with the deviation that follows from theirs where there are several seeds."""
    found, spread = ratio(one, other)
    return f"{found:.3f}" if one["seeds"] < 2 else f"{found:.3f} ± {spread:.3f}"


def verdict(theirs: Cell, ours: Cell) -> int:
    """1: theirs is larger by more than the deviation; -1: smaller; 0: neither."""
    found, spread = ratio(theirs, ours)
    return 1 if found - spread > 1 else -1 if found + spread < 1 else 0


def sorted_out(compared: Sequence[tuple[str, Cell, Cell]]) -> str:
    """Which are worse than ours, which no different, which better, of numbers where smaller is better.

    Args:
        compared: name, its cell and ours.
    """
    words = {1: f"worse than {OURS}", 0: "no different by more than the deviation", -1: "better"}
    named = {found: [name for name, *cells in compared if verdict(*cells) == found] for found in words}
    return "; ".join(f"{words[found]}: {', '.join(names)}" for found, names in named.items() if names)


def tried(what: str, of: str, compared: Iterable[tuple[str, Cell, Cell]]) -> str:
    """A sentence on another attempt: its numbers over ours.

    Args:
        what: was tried.
        of: the number, and whose.
        compared: where it was measured, its cell and ours.
    """
    return f" Tried, too: {what}; {of} is {' and '.join(f'{over(*cells)} {where}' for where, *cells in compared)}."


def stepped(summary: Mapping[str, Any], counts: Sequence[int], key: str, title: str, form: str) -> Table:
    """A table of methods by step counts.

    Args:
        summary: by method and number.
        counts: of steps.
        key: of a number, "{}" is the count.
        title: of the table.
        form: of each number.
    """
    head = ["method", *(f"{count} steps" if count > 1 else "1 step" for count in counts), "seeds"]
    rows = []
    for method, cells in summary.items():
        found = [cells[key.format(count)] for count in counts]
        rows.append((method, *(shown(cell, form) for cell in found), str(found[0]["seeds"])))
    return Table(title, head, rows)


def means(cells: Mapping[str, Cell], counts: Sequence[int], key: str) -> tuple[list[float], list[float]]:
    """Means and deviations of a method's numbers by step counts; see `stepped`."""
    found = [cells[key.format(count)] for count in counts]
    return [cell["mean"] for cell in found], [cell["deviation"] for cell in found]
