"""How exact the velocity is: ours and the published rule against a Gaussian whose flow is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....alignment import Alignment, NoiseSchedule
from .. import oracle
from ..section import Claim, Line, Plot, Section, Table, Text
from ..stage import Context, Result, Stage, number

MEAN = 0.4
"""Of the data in the curves: with it the velocity vanishes at no time, so that a relative error means something."""
NAMED = (0.7, 0.9, 0.97)
"""Flow times of the figures for the published rule, on data of mean 0."""
_SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear,
    "linear": NoiseSchedule.linear,
    "cosine": NoiseSchedule.cosine,
    "scaled_linear, zero terminal SNR": lambda: NoiseSchedule.scaled_linear().zero_terminal_snr(),
}
_CASES = [
    (name, prediction)
    for name in _SCHEDULES
    for prediction in (("v",) if "zero" in name else ("eps", "v", "x0"))
]  # fmt: skip
_SHOWN = ("scaled_linear", "v")
_POINTS, _OUTSIDE = 200, (0.0, 0.03, 0.99, 1.0)
_OURS = {"float64": torch.float64, "float32": torch.float32}
_GOALS = {"float64": 1e-12, "float32": 1e-5}
_PLAIN = "scaled_linear"
"""Stable Diffusion's schedule, which the goals are for: where t_min is 5e-5 (cosine), an eps network's own rounding is
divided by it."""


def settings(context: Context) -> dict[str, Any]:
    """What the errors are of."""
    return {"mean": MEAN, "points": _POINTS}


def run(context: Context) -> Result:
    """Relative errors over t of ours, in two precisions, and of the published rule; the largest, and outside."""
    cases = {f"{name}, {prediction}": _case(name, prediction) for name, prediction in _CASES}
    named = {f"{t:g}": _named(t) for t in NAMED}
    return {"cases": cases, "named": named, "numbers": _numbers(cases, named)}


def _case(name: str, prediction: str) -> dict[str, Any]:
    alignment = Alignment(_SCHEDULES[name](), prediction)
    t_min, t_max = alignment.t_range
    t = torch.linspace(t_min, t_max, _POINTS, dtype=torch.float64)
    outside = torch.tensor(_OUTSIDE, dtype=torch.float64)
    curves = {label: ours(alignment, t, MEAN, dtype) for label, dtype in _OURS.items()}
    published = _published(alignment, t, MEAN)
    return {
        "t_range": [t_min, t_max],
        "t": t.tolist(),
        "ours": {label: errors.tolist() for label, errors in curves.items()},
        "worst": {label: float(errors.max()) for label, errors in curves.items()},
        "published": [value if value == value and abs(value) < float("inf") else None for value in published.tolist()],
        "outside": {f"{at:g}": error for at, error in zip(_OUTSIDE, _beyond(alignment, outside), strict=True)},
    }


def ours(alignment: Alignment, t: Tensor, mean: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Relative error (T,) of our velocity, with a perfect network asked at exactly the time it is told.

    Args:
        alignment: of the network.
        t: (T,) in the covered range.
        mean: of the data.
        dtype: that the state and the network are computed in.
    """
    x_flow = oracle.states(t, mean).to(dtype)
    output = oracle.network(
        alignment.to_diffusion(x_flow, t), *oracle.exact_coefficients(t), alignment.prediction, mean
    )
    return _relative(alignment.velocity(output, x_flow, t), oracle.exact_velocity(x_flow, t, mean))


def _beyond(alignment: Alignment, t: Tensor) -> list[float]:
    """Relative error outside the covered range, where the network is asked at the nearest time it knows."""
    x_flow, known = oracle.states(t, MEAN), t.clamp(*alignment.t_range)
    x_diff = alignment.to_diffusion(x_flow, t)
    output = oracle.network(x_diff, *oracle.exact_coefficients(known), alignment.prediction, MEAN)
    return _relative(alignment.velocity(output, x_flow, t), oracle.exact_velocity(x_flow, t, MEAN)).tolist()


def _published(alignment: Alignment, t: Tensor, mean: float) -> Tensor:
    x_flow, levels = oracle.states(t, mean), alignment.schedule.alphas_cumprod
    found = oracle.published_velocity(x_flow, t, levels, alignment.prediction, mean)
    return _relative(found, oracle.exact_velocity(x_flow, t, mean))


def _named(t: float) -> dict[str, float]:
    alignment, time = Alignment(NoiseSchedule.scaled_linear(), "v"), torch.tensor([t], dtype=torch.float64)
    return {"ours": float(ours(alignment, time, 0.0)), "published": float(_published(alignment, time, 0.0))}


def _relative(found: Tensor, exact: Tensor) -> Tensor:
    return (found.double() - exact).norm(dim=1) / exact.norm(dim=1)


def _numbers(cases: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Rounding differs a little from processor to processor: an error has to double to be a worse one."""
    found = {
        f"{case}, {label}": number(error, "smaller", floor=max(error, _GOALS[label] / 10))
        for case, result in cases.items()
        for label, error in result["worst"].items()
    }
    return found | {f"published at t = {t}": number(each["published"], "") for t, each in named.items()}


def render(result: Result) -> Section:
    """The largest errors, the published rule's figures, the plot over t, and what happens outside."""
    cases = result["cases"]
    return Section(
        _claims(result),
        (
            Text(
                "Relative error of the velocity on data N(0.4, 0.5²), whose perfect network and perfect flow are known;"
                " ours calls the network at fractional timesteps by the closed form, the published rule (written from"
                " its description) looks time up in a table of 1001 entries and uses the index in tables of 1000."
            ),
            _plot(cases["{}, {}".format(*_SHOWN)]),
            Table(
                "Largest relative error over the covered range",
                ("schedule, prediction", "t from", "to", "ours, float64", "ours, float32", "published rule, float64"),
                [_row(name, case) for name, case in cases.items()],
            ),
            Table(
                "The published rule on data of mean 0 (scaled_linear, v)",
                ("t", "ours, float64", "published rule"),
                [(t, f"{each['ours']:.1e}", f"{each['published']:.2%}") for t, each in result["named"].items()],
            ),
            Table(
                "Ours outside the covered range, where no network was trained (relative error, float64)",
                ("schedule, prediction", *(f"t = {t:g}" for t in _OUTSIDE)),
                [(name, *(f"{error:.2g}" for error in case["outside"].values())) for name, case in cases.items()],
            ),
        ),
    )


def _claims(result: Result) -> list[Claim]:
    claims = []
    for label, goal in _GOALS.items():
        worst = max(case["worst"][label] for name, case in result["cases"].items() if name.split(", ")[0] == _PLAIN)
        text = f"largest relative error of our velocity on Stable Diffusion's schedule, {label} (eps, v, x0)"
        claims.append(Claim(text, f"{worst:.1e}", f"≤ {goal:g}", worst <= goal, main=label == "float64"))
    figures = ", ".join(f"{each['published']:.1%} at t = {t}" for t, each in result["named"].items())
    return [*claims, Claim("error of the published rule's velocity", figures, main=True)]


def _row(name: str, case: dict[str, Any]) -> tuple[str, ...]:
    known = [error for error in case["published"] if error is not None]
    first, last = case["t_range"]
    worst = case["worst"]
    return (
        name, f"{first:.5f}", f"{last:.5f}", f"{worst['float64']:.1e}", f"{worst['float32']:.1e}", f"{max(known):.1e}"
    )  # fmt: skip


def _plot(case: dict[str, Any]) -> Plot:
    lines = [Line("published rule", case["t"], case["published"])]
    lines += [Line(f"ours, {label}", case["t"], errors) for label, errors in case["ours"].items()]
    return Plot(
        "exactness", "Error of the velocity", "flow time (0 noise, 1 data)", "relative error", lines,
        note="{}, {} prediction".format(*_SHOWN), log_y=True,
    )  # fmt: skip


STAGE = Stage(
    "exactness",
    "The velocity against a Gaussian whose flow is known",
    1,
    (0.1, 0.1),
    run,
    render,
    settings=settings,
)
