"""The report on reflow as Markdown: a table for each number, methods by steps, and the goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Summary = Mapping[str, Mapping[str, Mapping[str, float]]]

_TABLES = (
    ("frechet_features", "Fréchet distance in the classifier's features (smaller is better)", "{:.2f}"),
    ("frechet_pixels", "Fréchet distance in 4 × 4 pixels (smaller is better)", "{:.4f}"),
    ("accuracy", "Share of samples read as the digit that was asked for", "{:.3f}"),
    ("rmse_to_teacher", "Distance of the pictures from the teacher's own of the same noise (RMS of pixels)", "{:.4f}"),
)
_TEACHER, _OURS = "base Euler", "fast"
_ALLOWED = {4: 1.05, 2: 1.10, 1: 1.30}
_WORSE, _STRAIGHTER = 3.0, 5.0


def markdown(setting: Mapping[str, Any], summary: Summary) -> str:
    """The whole report.

    Args:
        setting: of the runs, with sample_steps.
        summary: by method and number ("samples/4/accuracy"), see `summary.summary`.
    """
    steps = [int(count) for count in setting["sample_steps"]]
    shown = ", ".join(f"{name} {value}" for name, value in setting.items() if name != "sample_steps")
    parts = ["# Reflow on the tiny prior", f"Settings: {shown}. Mean ± deviation over the seeds; the number of seeds."]
    parts += [steps_table(summary, steps, f"samples/{{}}/{number}", title, form) for number, title, form in _TABLES]
    parts += [_straightness(summary), "## Goals\n\n" + "\n".join(f"- {line}" for line in goals(summary))]
    return "\n\n".join(parts) + "\n"


def steps_table(summary: Summary, steps: list[int], number: str, title: str, form: str) -> str:
    """A table of a number, methods by steps.

    Args:
        summary: by method and number.
        steps: step counts, a column each.
        number: its key, with {} for the step count.
        title: of the table.
        form: of the number, such as "{:.2f}".
    """
    head = "| method | " + " | ".join(f"{count} steps" if count > 1 else "1 step" for count in steps) + " | seeds |"
    lines = [f"## {title}", "", head, "|---" * (len(steps) + 2) + "|"]
    for method, numbers in summary.items():
        cells = [numbers[number.format(count)] for count in steps]
        values = [f"{form.format(cell['mean'])} ± {form.format(cell['deviation'])}" for cell in cells]
        lines.append(f"| {method} | {' | '.join(values)} | {cells[0]['seeds']:.0f} |")
    return "\n".join(lines)


def _straightness(summary: Summary) -> str:
    lines = ["## Straightness, E of the squared distance between the chord's velocity and the path's", ""]
    lines += ["| method | straightness | part of the speed squared |", "|---|---|---|"]
    for method, numbers in summary.items():
        if "straightness/mean" in numbers:
            mean, relative = numbers["straightness/mean"], numbers["straightness/relative"]
            lines.append(f"| {method} | {mean['mean']:.4f} ± {mean['deviation']:.4f} | {relative['mean']:.4f} |")
    return "\n".join(lines)


def goals(summary: Summary) -> list[str]:
    """What was aimed at, what was measured, and whether it holds."""

    def distance(method: str, count: int) -> float:
        return summary[method][f"samples/{count}/frechet_features"]["mean"]

    teacher, lines = distance(_TEACHER, 25), []
    for count, allowed in _ALLOWED.items():
        ratio = distance(_OURS, count) / teacher
        lines.append(verdict(f"ours at {count} steps over the teacher at 25", ratio, ratio <= allowed, f"≤ {allowed}"))
    for base in (_TEACHER, "base DPM-Solver++"):
        ratio = distance(base, 2) / distance(_OURS, 2)
        lines.append(verdict(f"{base} at 2 steps over ours", ratio, ratio >= _WORSE, f"≥ {_WORSE:g}"))
    straight = {name: summary[name]["straightness/mean"]["mean"] for name in (_TEACHER, _OURS)}
    ratio = straight[_TEACHER] / straight[_OURS]
    lines.append(verdict("the base's straightness over ours", ratio, ratio >= _STRAIGHTER, f"≥ {_STRAIGHTER:g}"))
    return lines


def verdict(what: str, found: float, holds: bool, goal: str) -> str:
    """A goal, what was found, and whether it holds, in a line."""
    return f"{what}: {found:.3f}, goal {goal}: {'holds' if holds else 'does not hold'}"
