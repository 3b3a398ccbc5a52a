"""The report's plots, in the look of the nodes' own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...files import written_whole
from ...training.plot import FAINT, INK, frame, page
from .section import Line, Plot

_COLOURS = ("#2f6fdb", "#d9642b", "#2f9e6e", "#8b5cf6", "#b8862b", "#c23a78", "#4b5563", "#0e9bb3")


def save_plot(plot: Plot, path: Path) -> None:
    """Writes a plot as PNG; the same plot gives the same bytes.

    Args:
        plot: to draw.
        path: of the file.
    """
    canvas, axes = page()
    if plot.log_x:
        axes.set_xscale("log", base=2)
    if plot.log_y:
        axes.set_yscale("log")
    for index, line in enumerate(plot.lines):
        _draw(axes, line, _COLOURS[index % len(_COLOURS)])
    for name, x in plot.marks.items():
        axes.axvline(x, color=FAINT, linewidth=1.0, linestyle=":")
        axes.annotate(name, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -12),
                      textcoords="offset points", fontsize=8, color=FAINT)  # fmt: skip
    _name_few(axes, plot)
    frame(
        axes, None if plot.log_y or plot.free_y else _top(plot), (plot.x_label, plot.y_label), (plot.title, plot.note)
    )
    if len(plot.lines) > 1 or plot.lines[0].label:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    with written_whole(path) as temporary:
        canvas.print_png(str(temporary), metadata={"Software": None})


def _draw(axes: Any, line: Line, colour: str) -> None:
    y = [math.nan if value is None else value for value in line.y]
    style = "--" if line.dashed else "-"
    marker = "o" if len(y) <= 12 else None
    axes.plot(line.x, y, style, color=colour, linewidth=2.0, marker=marker, markersize=4, label=line.label)
    if line.spread:
        low, high = ([v + sign * s for v, s in zip(y, line.spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(line.x, low, high, color=colour, alpha=0.12, linewidth=0)


def _name_few(axes: Any, plot: Plot) -> None:
    """Where there are few points, their own numbers stand at the axis."""
    ticks = sorted({x for line in plot.lines for x in line.x})
    if plot.log_x and len(ticks) <= 10:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def _top(plot: Plot) -> float:
    spreads = [(line, line.spread or [0.0] * len(line.y)) for line in plot.lines]
    tops = [y + s for line, given in spreads for y, s in zip(line.y, given, strict=True) if y is not None]
    return max(tops, default=0.0)
