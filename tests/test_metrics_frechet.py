"""The Fréchet distance: exact for Gaussians whose distance is known."""

import pytest
import torch

from diff2flow_nodes.metrics.frechet import frechet_distance


def _with_moments(mean, deviation, count=500, turn=None):
    """Samples whose sample mean and covariance are exactly these."""
    draw = torch.randn(count, len(mean), dtype=torch.float64)
    white = draw - draw.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    samples = white * torch.tensor(deviation, dtype=torch.float64)
    return (samples if turn is None else samples @ turn) + torch.tensor(mean, dtype=torch.float64)


def test_known_gaussians():
    one, two = _with_moments([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]), _with_moments([1.0, 1.0, 0.0], [2.0, 2.0, 1.5])
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    expected = 1 + 4 + 1 + 0 + 1  # |m1 - m2|² + sum (s1 - s2)², the covariances commute
    assert frechet_distance(one, two) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(one @ turn, two @ turn) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_covariances_that_do_not_commute():
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    one, two = _with_moments([0.0, 0.0], [1.0, 3.0]), _with_moments([0.0, 0.0], [1.0, 3.0], turn=turn)
    first, second = torch.cov(one.T), torch.cov(two.T)
    # tr((C1 C2)^(1/2)) of 2×2: sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2))
    crossed = torch.sqrt((first @ second).trace() + 2 * torch.sqrt(first.det() * second.det()))
    assert frechet_distance(one, two) == pytest.approx(float(first.trace() + second.trace() - 2 * crossed), abs=1e-8)


def test_sets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least 2 items"):
        frechet_distance(torch.ones(1, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="equal features"):
        frechet_distance(torch.ones(5, 2), torch.ones(5, 3))
