"""Input declarations that several nodes share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

Widget = tuple[Any, dict[str, Any]]


def number(
    default: float, maximum: float, step: float, tooltip: str, minimum: float = 0.0, rounding: float | None = False
) -> Widget:
    """A FLOAT, by default not rounded; `rounding` is the unit it is rounded to, None leaves that to the page."""
    rounded = {} if rounding is None else {"round": rounding}
    return ("FLOAT", {"default": default, "min": minimum, "max": maximum, "step": step, **rounded, "tooltip": tooltip})


def count(default: int, minimum: int, maximum: int, tooltip: str, step: int | None = None) -> Widget:
    """An INT."""
    steps = {} if step is None else {"step": step}
    return ("INT", {"default": default, "min": minimum, "max": maximum, **steps, "tooltip": tooltip})


def choice(names: Iterable[str], default: str, tooltip: str) -> Widget:
    """One of several names."""
    return (list(names), {"default": default, "tooltip": tooltip})


def switch(default: bool, tooltip: str) -> Widget:
    """On or off."""
    return ("BOOLEAN", {"default": default, "tooltip": tooltip})


def text(default: str, tooltip: str, multiline: bool = False) -> Widget:
    """A STRING."""
    return ("STRING", {"default": default, "multiline": multiline, "tooltip": tooltip})


def line(default: str, tooltip: str) -> Widget:
    """A STRING of one line, such as a name."""
    return ("STRING", {"default": default, "tooltip": tooltip})


def seed(tooltip: str, drawn_anew: bool = False) -> Widget:
    """A seed that stays as it is, or that the page draws anew after every run."""
    return (
        "INT",
        {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": drawn_anew, "tooltip": tooltip},
    )


def listed_numbers(listed: str, name: str) -> tuple[int, ...]:
    """The numbers in "4, 25".

    Args:
        listed: whole numbers with commas between.
        name: of the input.

    Raises:
        ValueError: none, or something that is no whole number of at least 1.
    """
    parts = [part for part in re.split(r"[,;\s]+", listed) if part]
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name} must be numbers of at least 1 with commas between, such as '4, 25', not {listed!r}")
    return tuple(int(part) for part in parts)
