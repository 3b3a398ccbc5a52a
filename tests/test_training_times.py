"""Distributions of flow times: they have the densities that they say."""

import math

import pytest
import torch

from diff2flow_nodes.training.times import DISTRIBUTIONS, MODE_SCALE, U_SHAPE, drawn

GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def _logit_normal(t):
    z = torch.logit(t)
    return torch.exp(-0.5 * (z - 0.3) ** 2 / 0.8**2) / (0.8 * math.sqrt(2 * math.pi)) / (t * (1 - t))


def _u_shaped(t):
    return U_SHAPE * torch.cosh(U_SHAPE * (2 * t - 1)) / math.sinh(U_SHAPE)


def _mode(t):
    """1 / t'(u) at the u that gives t, by bisection."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle - MODE_SCALE * (torch.sin(math.pi * middle / 2) ** 2 - middle) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 1 / (1 + MODE_SCALE - MODE_SCALE * math.pi / 2 * torch.sin(math.pi * low))


DENSITIES = {"uniform": torch.ones_like, "logit_normal": _logit_normal, "u_shaped": _u_shaped, "mode": _mode}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_histogram_is_the_density(name):
    t = drawn(name, GRID, mean=0.3, spread=0.8)
    assert t.min() >= 0 and t.max() <= 1 and (t.diff() >= 0).all()
    found = torch.histc(t, 50, 0, 1) * 50 / len(t)
    centres = (torch.arange(50, dtype=torch.float64)[:, None] + (torch.arange(20) + 0.5) / 20) / 50
    torch.testing.assert_close(found, DENSITIES[name](centres).mean(dim=1), rtol=0.01, atol=0.01)


def test_both_ends_of_the_uniform_numbers_are_legal():
    for name in DISTRIBUTIONS:
        assert torch.isfinite(drawn(name, torch.tensor([0.0, 1.0 - 2**-24]))).all()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="time_distribution must be one of uniform"):
        drawn("normal", GRID)
