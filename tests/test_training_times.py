"""Distributions of flow times: they have the densities that they say."""

import math

import pytest
import torch

from diff2flow_nodes.training.times import DISTRIBUTIONS, MODE_SCALE, drawn

GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def _logit_normal(t):
    z = torch.logit(t)
    return torch.exp(-0.5 * (z - 0.3) ** 2 / 0.8**2) / (0.8 * math.sqrt(2 * math.pi)) / (t * (1 - t))


def _exponentials(a):
    """e^{a t} + e^{a (1-t)} over its integral from 0 to 1."""
    return lambda t: (torch.exp(a * t) + torch.exp(a * (1 - t))) * a / (2 * (math.exp(a) - 1))


def _mode(t):
    """1 / t'(u) at the u that gives t, by bisection."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle - MODE_SCALE * (torch.sin(math.pi * middle / 2) ** 2 - middle) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 1 / (1 + MODE_SCALE - MODE_SCALE * math.pi / 2 * torch.sin(math.pi * low))


DENSITIES = {
    "uniform": torch.ones_like,
    "logit_normal": _logit_normal,
    "u_shaped": _exponentials(8.0),
    "mode": _mode,
    "u_shaped_lee": _exponentials(4.0),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_histogram_is_the_density(name):
    t = drawn(name, GRID, mean=0.3, spread=0.8)
    assert t.min() >= 0 and t.max() <= 1 and (t.diff() >= 0).all()
    found = torch.histc(t, 50, 0, 1) * 50 / len(t)
    centres = (torch.arange(50, dtype=torch.float64)[:, None] + (torch.arange(20) + 0.5) / 20) / 50
    torch.testing.assert_close(found, DENSITIES[name](centres).mean(dim=1), rtol=0.01, atol=0.01)


def test_the_times_of_lee_lin_and_fanti_are_the_published_ones():
    """Drawn here as in arXiv 2405.20320: t from the density e^{4t} on [0, 1], half of them turned round to 1 - t."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(400_000, dtype=torch.float64, generator=generator)
    one_sided = torch.log1p(u * (math.exp(4.0) - 1)) / 4.0
    theirs = torch.where(torch.rand(len(u), generator=generator) < 0.5, one_sided, 1 - one_sided)
    expected = torch.histc(theirs, 20, 0, 1)
    found = torch.histc(drawn("u_shaped_lee", torch.rand(len(u), dtype=torch.float64, generator=generator)), 20, 0, 1)
    chi_square = ((found - expected) ** 2 / (found + expected)).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: above it once in a thousand
    other = torch.histc(drawn("u_shaped", GRID), 20, 0, 1) * len(u) / len(GRID)
    assert ((other - expected) ** 2 / (other + expected)).sum() > 10_000


@pytest.mark.parametrize(("name", "share"), [("u_shaped", 0.133), ("u_shaped_lee", 0.324)])
def test_the_share_of_the_middle_half(name, share):
    t = drawn(name, GRID)
    assert ((t > 0.25) & (t < 0.75)).double().mean() == pytest.approx(share, abs=1e-3)


def test_times_of_earlier_runs_are_drawn_as_they_were():
    """u_shaped to the bit, by the formula of the runs that continue with it."""
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn("u_shaped", u), (1.0 + torch.asinh((2.0 * u - 1.0) * math.sinh(4.0)) / 4.0) / 2.0)


def test_both_ends_of_the_uniform_numbers_are_legal():
    for name in DISTRIBUTIONS:
        assert torch.isfinite(drawn(name, torch.tensor([0.0, 1.0 - 2**-24]))).all()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="time_distribution must be one of uniform"):
        drawn("normal", GRID)
