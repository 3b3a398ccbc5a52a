"""Curves as pictures: the loss of a run, and how straight a model's paths are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ..samplers.straightness import Straightness

_SIZE, _DPI = (8.0, 4.5), 120
INK, FAINT, LINE, GRID = "#22262e", "#6b7280", "#2f6fdb", "#e6e8ec"


def loss_plot(losses: Sequence[float], title: str) -> Tensor:
    """IMAGE (1, H, W, 3) float32 in [0, 1]: the loss of each step, and its running mean.

    Args:
        losses: of steps 1, 2, ...; at least one.
        title: of the picture.
    """
    canvas, axes = page()
    steps = numpy.arange(1, len(losses) + 1)
    smooth = running_mean(losses)
    axes.plot(steps, losses, ".", markersize=3.5, markeredgewidth=0, color=LINE, alpha=0.35, label="each step")
    axes.plot(steps, smooth, "-o" if len(losses) == 1 else "-", color=LINE, linewidth=2.2, label="running mean")
    axes.set_xlim(1, max(2, len(losses)))
    top = float(numpy.quantile(losses, 0.99)) if len(losses) > 20 else max(losses)  # outliers do not flatten the rest
    frame(axes, top, ("step", "loss"), (title, f"{len(losses)} steps, loss {smooth[-1]:.4f}"))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right", markerscale=2.0)
    return _drawn(canvas)


def straightness_plot(found: Straightness) -> Tensor:
    """IMAGE (1, H, W, 3) float32 in [0, 1]: S(t) over the flow time, from noise to data."""
    canvas, axes = page()
    ends = torch.cat([found.times, found.times[-1:] + found.lengths[-1:]]).numpy()
    axes.stairs(found.bends.numpy(), ends, color=LINE, linewidth=2.2)
    axes.stairs(found.bends.numpy(), ends, color=LINE, alpha=0.12, fill=True)
    axes.set_xlim(0.0, 1.0)
    labels = ("flow time (0 noise, 1 data)", "squared distance from the straight line's velocity")
    note = f"mean {found.mean:.4g}, {100 * found.relative:.3g} % of the speed squared"
    frame(axes, float(found.bends.max()), labels, ("Straightness", note))
    return _drawn(canvas)


def running_mean(losses: Sequence[float]) -> list[float]:
    """Exponential running mean over about a twentieth of the run, without the start's bias."""
    keep = 1.0 - 1.0 / max(1.0, len(losses) / 20)
    total = weight = 0.0
    means = []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1.0
        means.append(total / weight)
    return means


def page() -> tuple[Any, Any]:
    """Canvas and axes of an empty picture, 960 × 540 px."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
    return FigureCanvasAgg(figure), figure.add_subplot()


def _drawn(canvas: Any) -> Tensor:
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3].astype(numpy.float32) / 255.0
    return torch.from_numpy(pixels).unsqueeze(0)


def frame(axes: Any, top: float | None, labels: tuple[str, str], titles: tuple[str, str]) -> None:
    """Grid, labels and titles as all pictures here have them.

    Args:
        axes: matplotlib's.
        top: the values go from 0 to a little above it; None leaves their range as it is.
        labels: of both axes.
        titles: on the left and on the right.
    """
    if top is not None:
        axes.set_ylim(0.0, 1.15 * top if top > 0 else 1.0)
    axes.set_xlabel(labels[0], color=INK)
    axes.set_ylabel(labels[1], color=INK)
    axes.set_title(titles[0], loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)
    axes.set_title(titles[1], loc="right", color=FAINT, fontsize=10, pad=12)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(INK)
