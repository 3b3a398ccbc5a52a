"""The report on depth as Markdown: methods by steps, what they are compared with, and the goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .reflow_table import Summary, steps_table, verdict

_NUMBERS = (
    ("abs_rel", "AbsRel, the mean of |estimate - truth|/truth (smaller is better)", "{:.4f}"),
    ("delta1", "delta1, the share of pixels right within a factor of 1.25 (larger is better)", "{:.4f}"),
)
_OURS, _OTHERS = "diff2flow", ("flow_matching", "diffusion")
_COMPARED = (2, 10)


def markdown(setting: Mapping[str, Any], summary: Summary) -> str:
    """The whole report.

    Args:
        setting: of the runs, with sample_steps.
        summary: by method and number ("steps/4/abs_rel", "abs_rel"), see `summary.summary`.
    """
    steps = [int(count) for count in setting["sample_steps"]]
    shown = ", ".join(f"{name} {value}" for name, value in setting.items() if name != "sample_steps")
    stepped = {name: numbers for name, numbers in summary.items() if f"steps/{steps[0]}/abs_rel" in numbers}
    plain = {name: numbers for name, numbers in summary.items() if name not in stepped}
    parts = ["# Depth on the tiny prior", f"Settings: {shown}. Mean ± deviation over the seeds; the number of seeds."]
    parts += [steps_table(stepped, steps, f"steps/{{}}/{number}", title, form) for number, title, form in _NUMBERS]
    parts += [_plain_table(plain, "For scale", "")]
    merged = {name: numbers for name, numbers in stepped.items() if "ensemble/abs_rel" in numbers}
    parts += [_plain_table(merged, _ensemble_title(setting), "ensemble/")] if merged else []
    parts += _flickers(stepped)
    parts += ["## Goals\n\n" + "\n".join(f"- {line}" for line in goals(setting, summary))]
    return "\n\n".join(parts) + "\n"


def _ensemble_title(setting: Mapping[str, Any]) -> str:
    return f"Ensembles of {setting['ensemble']} in {setting['ensemble_steps']} steps"


def _plain_table(summary: Summary, title: str, prefix: str) -> str:
    lines = [f"## {title}", "", "| method | AbsRel | delta1 | RMSE, m | seeds |", "|---|---|---|---|---|"]
    for method, numbers in summary.items():
        cells = [numbers[f"{prefix}{name}"] for name in ("abs_rel", "delta1", "rmse")]
        values = [f"{cell['mean']:.4f} ± {cell['deviation']:.4f}" for cell in cells]
        lines.append(f"| {method} | {' | '.join(values)} | {cells[0]['seeds']:.0f} |")
    return "\n".join(lines)


def _flickers(summary: Summary) -> list[str]:
    """A table, if videos were measured."""
    measured = {method: numbers for method, numbers in summary.items() if "flicker/fixed" in numbers}
    if not measured:
        return []
    lines = ["## Flicker: mean change of raw depth from frame to frame", ""]
    lines += ["| method | fixed noise | fresh noise | truth |", "|---|---|---|---|"]
    for method, numbers in measured.items():
        values = [f"{numbers[f'flicker/{name}']['mean']:.4f}" for name in ("fixed", "fresh", "truth")]
        lines.append(f"| {method} | {' | '.join(values)} |")
    return ["\n".join(lines)]


def goals(setting: Mapping[str, Any], summary: Summary) -> list[str]:
    """What was aimed at, what was measured, and whether it holds; what has no runs is left out."""
    if _OURS not in summary:
        return []
    ours, lines = summary[_OURS], []
    for other in (name for name in _OTHERS if name in summary):
        for count in _COMPARED:
            apart = _ratio(summary[other], ours, f"steps/{count}/abs_rel")
            lines.append(verdict(f"AbsRel of {other} over ours in {count} steps", apart, apart > 1.0, "> 1"))
            more = _difference(ours, summary[other], f"steps/{count}/delta1")
            lines.append(verdict(f"delta1 of ours minus {other}'s in {count} steps", more, more > 0.0, "> 0"))
    if "ensemble/abs_rel" in ours:
        one, merged = (ours[key]["mean"] for key in (f"steps/{setting['ensemble_steps']}/abs_rel", "ensemble/abs_rel"))
        lines.append(verdict("AbsRel of the ensemble over one's", merged / one, merged <= one, "≤ 1"))
    if "flicker/fixed" in ours:
        still = ours["flicker/fixed"]["mean"] / ours["flicker/fresh"]["mean"]
        lines.append(verdict("flicker with fixed noise over fresh noise's", still, still < 1.0, "< 1"))
    return lines


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> float:
    return one[key]["mean"] / other[key]["mean"]


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> float:
    return one[key]["mean"] - other[key]["mean"]
