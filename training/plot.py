"""The loss of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

_SIZE, _DPI = (8.0, 4.5), 120
_INK, _LINE, _GRID = "#22262e", "#2f6fdb", "#e6e8ec"


def loss_plot(losses: Sequence[float], title: str) -> Tensor:
    """IMAGE (1, H, W, 3) float32 in [0, 1]: the loss of each step, and its running mean.

    Args:
        losses: of steps 1, 2, ...; at least one.
        title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = numpy.arange(1, len(losses) + 1)
    smooth = running_mean(losses)
    axes.plot(steps, losses, ".", markersize=3.5, markeredgewidth=0, color=_LINE, alpha=0.35, label="each step")
    axes.plot(steps, smooth, "-o" if len(losses) == 1 else "-", color=_LINE, linewidth=2.2, label="running mean")
    axes.set_xlim(1, max(2, len(losses)))
    _frame(axes, losses)
    axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold", pad=12)
    axes.set_title(f"{len(losses)} steps, loss {smooth[-1]:.4f}", loc="right", color="#6b7280", fontsize=10, pad=12)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right", markerscale=2.0)
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3].astype(numpy.float32) / 255.0
    return torch.from_numpy(pixels).unsqueeze(0)


def running_mean(losses: Sequence[float]) -> list[float]:
    """Exponential running mean over about a twentieth of the run, without the start's bias."""
    keep = 1.0 - 1.0 / max(1.0, len(losses) / 20)
    total = weight = 0.0
    means = []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1.0
        means.append(total / weight)
    return means


def _frame(axes: Any, losses: Sequence[float]) -> None:
    """Axes, grid and a range that a few outliers do not flatten."""
    top = float(numpy.quantile(losses, 0.99)) if len(losses) > 20 else max(losses)
    axes.set_ylim(0.0, 1.15 * top if top > 0 else 1.0)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_INK)
