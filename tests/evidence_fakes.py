"""Stages that measure nothing, for the tests of the evidence's frame; in a module that other processes can import."""

from __future__ import annotations

import os

from diff2flow_nodes.bench.evidence.section import Claim, Line, Plot, Section, Table, Text
from diff2flow_nodes.bench.evidence.stage import Context, Stage, number


def counted(context: Context) -> dict:
    """Counts its runs in its folder."""
    ticks = context.folder("count") / "ticks"
    ticks.write_text(ticks.read_text() + "x" if ticks.exists() else "x")
    return {"numbers": {"answer": number(42.0, "smaller", 0.5, seeds=3)}, "x": [1, 2, 4], "y": [0.5, None, 2.0]}


def failing(context: Context) -> dict:
    raise RuntimeError("no such\n luck")


def dying(context: Context) -> dict:
    os._exit(7)


def shown(result: dict) -> Section:
    plot = Plot("curve", "A curve", "x", "y", [Line("ours", result["x"], result["y"])], log_x=True)
    table = Table("Numbers", ("name", "value"), [("answer", f"{result['numbers']['answer']['value']:g}")])
    return Section(
        [Claim("it is 42", "42", "≤ 43", True, main=True), Claim("it is 7", "42", "7", False)],
        (Text("Words."), plot, table),
    )


def quick_settings(context: Context) -> dict:
    return {"amount": 2 if context.quick else 3}


def left(context: Context) -> str:
    return "nobody is there"


GOOD = Stage("good", "A good one", 1, (0.1, 0.1), counted, shown, settings=quick_settings, seeded=True)
BAD = Stage("bad", "A bad one", 2, (0.1, 0.1), failing, shown)
AFTER = Stage("after", "After the bad one", 2, (0.1, 0.1), counted, shown, needs=("bad",))
LEFT = Stage("left", "One without its means", 2, (0.1, 0.1), counted, shown, left_out=left)
LAST = Stage("last", "After the one left out", 3, (0.1, 0.1), counted, shown, needs=("left",), alone=True)
DYING = Stage("dying", "One whose process dies", 3, (0.1, 0.1), dying, shown)
ALL = (GOOD, BAD, AFTER, LEFT, LAST)
