"""The figure of docs/method.md: paths of a diffusion model, of the flow it is, and of the flow after reflow.

    python -m diff2flow_nodes.bench.method_figure --out docs/pictures/method.png

The data are numbers around three values, so that the perfect network is known in closed form: nothing is trained or
downloaded, and the maps and solvers are those of the pack.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment import Alignment, NoiseSchedule
from ..files import written_whole
from ..samplers import integrate, time_grid
from ..training.plot import FAINT, GRID, INK, LINE

CENTRES, SPREAD = (-1.5, 0.1, 1.3), 0.06
"""The data: three equally frequent values, each with a little normal spread."""
_COLD, _LINE, _WALK = "#9aa3b2", LINE, "#d9480f"
_DRAWN = torch.linspace(-2.1, 2.1, 15, dtype=torch.float64)
_WALKED = torch.tensor([-0.75, 0.6, 1.5], dtype=torch.float64)
_FINE, _FEW = 400, 2
_PAIR = (1.1, CENTRES[0])
"""Noise and data of the pair that is drawn as training sees it."""

Velocity = Callable[[Tensor, Tensor], Tensor]


def perfect_eps(alignment: Alignment, x_diff: Tensor, tau: Tensor) -> Tensor:
    """What a perfect eps network says of the data at x_diff (B,), tau (): E[x_noise | x_diff].

    Each centre m is seen as a normal of mean alpha·m and variance alpha²·SPREAD² + sigma².
    """
    alpha, sigma = alignment.coefficients(alignment.flow_time(tau))
    centres = torch.tensor(CENTRES, dtype=x_diff.dtype)
    variance = (alpha * SPREAD) ** 2 + sigma**2
    off = x_diff[:, None] - alpha * centres
    shares = torch.softmax(-(off**2) / (2 * variance), dim=1)
    x_data = (shares * (centres + alpha * SPREAD**2 / variance * off)).sum(dim=1)
    return (x_diff - alpha * x_data) / sigma


def base_velocity(alignment: Alignment) -> Velocity:
    """The velocity that the untrained network stands for, x (B,) and t ()."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        eps = perfect_eps(alignment, alignment.to_diffusion(x, t), alignment.timestep(t))
        return alignment.velocity(eps, x, t)

    return velocity


def reflowed_velocity(x_noise: Tensor, x_data: Tensor) -> Velocity:
    """The velocity that reflow learns from pairs: along the straight line on which x lies.

    Args:
        x_noise, x_data: (N,) increasing; paths of one number never cross, so neither do these lines.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        lines = (1 - t) * x_noise + t * x_data
        right = torch.searchsorted(lines, x.contiguous()).clamp(1, len(lines) - 1)
        part = (x - lines[right - 1]) / (lines[right] - lines[right - 1])
        slopes = x_data - x_noise
        return torch.lerp(slopes[right - 1], slopes[right], part)

    return velocity


def terminal(alignment: Alignment, x_noise: Tensor) -> Tensor:
    """Where sampling of a base model begins: x_flow at t_min, as Stable Diffusion does at tau = 999."""
    return alignment.to_flow(x_noise, torch.tensor(alignment.schedule.steps - 1))


def walked(velocity: Velocity, x: Tensor, times: Tensor, solver: str = "euler") -> Tensor:
    """The states (N + 1, B) at all the times (N + 1,) of a path from x (B,)."""
    states = [x]
    integrate(velocity, x, times, solver, lambda index, t, state, slope: states.append(state))
    return torch.stack(states)


def draw(out: Path) -> Path:
    """Writes the figure (PNG) and returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.6), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    (clocks, diffusion), (flow, reflowed) = figure.subplots(2, 2)
    alignment = Alignment(NoiseSchedule.scaled_linear(), "eps")
    times = time_grid(_FINE, start=alignment.t_range[0])
    paths = walked(base_velocity(alignment), terminal(alignment, _DRAWN), times, "rk4")
    _draw_clocks(clocks, alignment)
    _draw_diffusion(diffusion, alignment, times, paths)
    _draw_flow(flow, alignment, times, paths)
    _draw_reflowed(reflowed, alignment, times)
    figure.legend(
        *flow.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK
    )
    figure.tight_layout(h_pad=2.2, w_pad=2.4, rect=(0, 0.045, 1, 1))
    with written_whole(Path(out)) as temporary:
        canvas.print_png(str(temporary))
    return Path(out)


def _draw_clocks(axes: Any, alignment: Alignment) -> None:
    tau = torch.linspace(0, alignment.schedule.steps - 1, 500, dtype=torch.float64)
    t_min, t_max = alignment.t_range
    axes.axhspan(0, t_min, color=GRID)
    axes.axhspan(t_max, 1, color=GRID)
    axes.plot(tau, alignment.flow_time(tau), color=_LINE, linewidth=2.2)
    axes.text(20, t_min / 2, "times that the checkpoint never saw", fontsize=8.5, color=FAINT, ha="right", va="center")
    axes.text(140, 0.93, f"t = {t_max:.3f} at τ = 0", fontsize=8.5, color=INK, ha="right", va="center")
    axes.text(985, 0.3, f"t = {t_min:.3f} at τ = 999", fontsize=8.5, color=INK, ha="left", va="center")
    axes.set_xlim(999, 0)
    _dress(axes, "1  Two clocks for one path", "network timestep τ (999 noise, 0 data)", "flow time t", (0, 1))


def _draw_diffusion(axes: Any, alignment: Alignment, times: Tensor, paths: Tensor) -> None:
    tau = alignment.timestep(times)
    seen = times <= alignment.t_range[1]
    x_diff = torch.stack([alignment.to_diffusion(x, t) for x, t in zip(paths, times, strict=True)])
    axes.plot(tau[seen], x_diff[seen], color=_COLD, linewidth=1.1)
    alpha, sigma = alignment.coefficients(times)
    axes.plot(tau[seen], (alpha * _PAIR[1] + sigma * _PAIR[0])[seen], "--", color=INK, linewidth=1.6)
    axes.set_xlim(999, 0)
    _dress(axes, "2  What diffusion sees", "network timestep τ (999 noise, 0 data)", "x_diff")


def _draw_flow(axes: Any, alignment: Alignment, times: Tensor, paths: Tensor) -> None:
    t_min = alignment.t_range[0]
    axes.axvspan(0, t_min, color=GRID)
    axes.plot(times, paths, color=_COLD, linewidth=1.1)[0].set_label("the paths of the network")
    axes.plot((0, 1), _PAIR, "--", color=INK, linewidth=1.6, label="one training pair: its noise, its image")
    grid = time_grid(_FEW, start=t_min)
    _draw_walk(axes, grid, walked(base_velocity(alignment), terminal(alignment, _WALKED), grid))
    _dress(axes, "3  The same network as a flow", "flow time t (0 noise, 1 data)", "x_flow")


def _draw_reflowed(axes: Any, alignment: Alignment, times: Tensor) -> None:
    noise = torch.linspace(-4, 4, 801, dtype=torch.float64)
    data = walked(base_velocity(alignment), terminal(alignment, noise), times, "rk4")[-1]
    after, ends = reflowed_velocity(noise, data), time_grid(1)
    axes.plot(ends, walked(after, _DRAWN, ends), color=_COLD, linewidth=1.1)
    grid = time_grid(_FEW)
    _draw_walk(axes, grid, walked(after, _WALKED, grid))
    _dress(axes, "4  After reflow", "flow time t (0 noise, 1 data)", "x_flow")


def _draw_walk(axes: Any, grid: Tensor, states: Tensor) -> None:
    lines = axes.plot(grid, states, "o-", color=_WALK, linewidth=1.8, markersize=4.5)
    lines[0].set_label(f"sampling in {_FEW} Euler steps")


def _dress(axes: Any, title: str, across: str, up: str, limits: tuple[float, float] = (-2.4, 2.4)) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold", pad=8)
    axes.set_xlabel(across, fontsize=9, color=FAINT)
    axes.set_ylabel(up, fontsize=9, color=FAINT)
    axes.set_ylim(*limits)
    axes.tick_params(labelsize=8, colors=FAINT)
    if limits[0] < 0:
        for centre in CENTRES:
            axes.axhline(centre, color=GRID, linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draws it."""
    parser = argparse.ArgumentParser(description="Draws the figure of docs/method.md.")
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
