"""The figure of docs/method.md shows what it says: a perfect network, curved paths, straight ones after reflow."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.bench import method_figure as figure
from diff2flow_nodes.samplers import time_grid

ALIGNMENT = Alignment(NoiseSchedule.scaled_linear(), "eps")
NOISE = torch.linspace(-2, 2, 401, dtype=torch.float64)
LIMIT = 150_000
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "method.png"


def _data(steps: int, solver: str = "rk4") -> torch.Tensor:
    start = figure.terminal(ALIGNMENT, NOISE)
    times = time_grid(steps, start=ALIGNMENT.t_range[0])
    return figure.walked(figure.base_velocity(ALIGNMENT), start, times, solver)[-1]


def _missed(x: torch.Tensor) -> float:
    """Mean distance from the nearest centre of the data."""
    return float((x[:, None] - torch.tensor(figure.CENTRES)).abs().min(dim=1).values.mean())


def test_the_network_is_the_perfect_one():
    """Against the mean of x_noise over draws that led to nearly the same x_diff."""
    random = torch.Generator().manual_seed(0)
    draws, tau = 400_000, torch.tensor(600.0)
    alpha, sigma = ALIGNMENT.coefficients(ALIGNMENT.flow_time(tau))
    centres = torch.tensor(figure.CENTRES)[torch.randint(3, (draws,), generator=random)]
    eps = torch.randn(draws, generator=random)
    x_diff = alpha * (centres + figure.SPREAD * torch.randn(draws, generator=random)) + sigma * eps
    for place in (-0.5, 0.3, 1.2):
        near = (x_diff - place).abs() < 0.03
        said = figure.perfect_eps(ALIGNMENT, torch.tensor([place], dtype=torch.float64), tau)
        assert abs(float(eps[near].mean()) - float(said)) < 0.04


def test_two_steps_miss_before_reflow_and_hit_after_it():
    exact = _data(200)
    assert _missed(exact) < 0.08 and _missed(_data(2, "euler")) > 0.25
    after = figure.reflowed_velocity(NOISE, exact)
    straight = figure.walked(after, NOISE, time_grid(2))[-1]
    torch.testing.assert_close(straight, exact, rtol=0, atol=1e-6)


def test_it_is_drawn_and_the_one_in_the_docs_is_of_that_size(tmp_path):
    drawn = figure.draw(tmp_path / "method.png")
    assert PICTURE.stat().st_size < LIMIT
    assert Image.open(drawn).size == Image.open(PICTURE).size
