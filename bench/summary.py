"""Mean and deviation over seeds, of runs that are named "method/seed"."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any


def summary(runs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and values over the seeds of every number, by method; nested keys are joined by "/"."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, result in sorted(runs.items(), key=lambda run: int(run[0].rpartition("/")[2])):
        numbers = found.setdefault(name.rpartition("/")[0], {})
        for key, value in _flat(result):
            numbers.setdefault(key, []).append(value)
    return {name: {key: _spread(values) for key, values in numbers.items()} for name, numbers in found.items()}


def ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Ratio of two cells' means, and its deviation; 0 with one seed.

    That of the seeds' own ratios where both were measured with the same seeds, which draw the same noise; else what
    follows from the two deviations.
    """
    found = one["mean"] / other["mean"]
    pairs = list(zip(one.get("values", ()), other.get("values", ()), strict=False))
    if len(pairs) == one["seeds"] == other["seeds"] > 1 and all(value for _, value in pairs):
        return found, statistics.stdev(first / second for first, second in pairs)
    parts = [cell["deviation"] / cell["mean"] if cell["mean"] else 0.0 for cell in (one, other)]
    return found, found * (parts[0] ** 2 + parts[1] ** 2) ** 0.5


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "seeds": len(values), "values": values}


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
