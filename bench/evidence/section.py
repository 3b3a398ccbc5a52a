"""What the report shows of a stage: claims, tables, plots and sentences, all made of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """Something that a measurement bears out or does not.

    Args:
        text: what is claimed.
        value: what was found, with its unit.
        goal: what was aimed at; "" for none.
        holds: whether it was reached; None: nothing was aimed at, or too little was run to say.
        main: whether it belongs to what one reads first.
    """

    text: str
    value: str
    goal: str = ""
    holds: bool | None = None
    main: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: above it.
        head: of the columns.
        rows: of as many cells as the head has.

    Raises:
        ValueError: a row of another length.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"the table {self.title!r} has {len(self.head)} columns, its row {row} {len(row)}")


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Args:
        label: in the legend.
        x, y: its points; None in y interrupts it.
        spread: of each y; drawn as a band.
        dashed: drawn so.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A picture of lines.

    Args:
        name: of the file, without its ending.
        title, note: above it, left and right.
        x_label, y_label: with their units.
        lines: drawn.
        log_x, log_y: axes by powers of ten (x: of two).
        free_y: the y axis need not begin at 0.
        marks: of x, where a vertical line is drawn, and what it is called.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    free_y: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Section:
    """What the report shows of a stage, in this order.

    Args:
        claims: above the parts; the main ones also at the top of the report.
        parts: Table, Plot and Text.
    """

    claims: Sequence[Claim] = ()
    parts: Sequence[Table | Plot | Text] = ()


def shown(cell: Mapping[str, Any], form: str = "{:.3f}") -> str:
    """ "mean ± deviation" of a cell of `bench.summary`, or of a number of `stage.number`.

    Args:
        cell: mean, deviation, seeds; or value, spread, seeds.
        form: of each; the deviation has no sign.
    """
    mean = cell["mean"] if "mean" in cell else cell["value"]
    spread = cell["deviation"] if "deviation" in cell else cell["spread"]
    return f"{form.format(mean)} ± {form.replace('+', '').format(spread)}" if cell["seeds"] > 1 else form.format(mean)
