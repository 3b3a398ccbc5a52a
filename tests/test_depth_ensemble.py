"""Ensembles: affine copies become one, noise averages out, and nothing collapses."""

import numpy
import pytest
import torch

from diff2flow_nodes.depth.ensemble import flicker, merged


def _members(count=5, noise=0.0, batch=2, seed=1):
    """The depth (B, H, W), and affine copies of it with noise (E, B, H, W), float64."""
    draw = torch.Generator().manual_seed(seed)
    depth = torch.rand(batch, 24, 32, generator=draw, dtype=torch.float64)
    scales = 0.4 + 1.6 * torch.rand(count, batch, 1, 1, generator=draw, dtype=torch.float64)
    shifts = torch.randn(count, batch, 1, 1, generator=draw, dtype=torch.float64)
    wrong = noise * torch.randn(count, batch, 24, 32, generator=draw, dtype=torch.float64)
    return depth, scales * (depth + wrong) + shifts, scales, shifts


def _error(found, truth):
    """RMS of found's best affine fit to truth, a part of truth's spread."""
    x, y = found.flatten(), truth.flatten()
    x, y = x - x.mean(), y - y.mean()
    return float((y - x * (x @ y) / (x @ x)).square().mean().sqrt() / y.std())


@pytest.mark.parametrize("reduction", ["median", "mean"])
def test_affine_copies_become_one(reduction):
    depth, members, scales, shifts = _members()
    found, uncertainty = merged(members, reduction)
    torch.testing.assert_close(found, scales.mean(dim=0) * depth + shifts.mean(dim=0), atol=1e-9, rtol=1e-9)
    assert uncertainty.max() < 1e-9 and uncertainty.shape == found.shape == depth.shape


@pytest.mark.parametrize("reduction", ["median", "mean"])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_a_merged_depth_is_better_than_each_member(reduction, noise):
    depth, members, _, _ = _members(6, noise)
    found, uncertainty = merged(members, reduction)
    for b in range(len(depth)):
        singles = [_error(member[b], depth[b]) for member in members]
        assert _error(found[b], depth[b]) < 0.7 * min(singles)
    assert uncertainty.min() >= 0 and uncertainty.mean() > 0


@pytest.mark.parametrize("reduction", ["median", "mean"])
def test_nothing_collapses_and_the_gauge_holds(reduction):
    """Even members of noise alone keep their mean level and about the spread of their reduction."""
    draw = torch.Generator().manual_seed(9)
    members = 2.0 + torch.randn(4, 1, 32, 32, generator=draw, dtype=torch.float64)
    found = merged(members, reduction).depth
    assert float(found.mean()) == pytest.approx(2.0, abs=0.1) and float(found.std()) > 0.3
    _, copies, _, _ = _members(4, 0.1)
    mean = merged(copies, "mean").depth
    torch.testing.assert_close(mean.mean(dim=(1, 2)), copies.mean(dim=(0, 2, 3)), atol=1e-9, rtol=0)
    spread = copies.std(dim=(2, 3)).mean(dim=0)
    assert (mean.std(dim=(1, 2)) / spread - 1).abs().max() < 0.15


def test_the_mean_is_the_main_direction_of_the_members():
    """Alternating least squares for the mean is power iteration on the members' correlations."""
    _, members, _, _ = _members(5, 0.2)
    draw = torch.Generator().manual_seed(2)
    members[:2] += 2.0 * torch.randn(2, 2, 24, 32, generator=draw, dtype=torch.float64)  # two bad members
    found = merged(members, "mean").depth
    for b in range(2):
        flat = members[:, b].flatten(1).numpy()
        unit = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)
        weights = abs(numpy.linalg.eigh(numpy.corrcoef(flat))[1][:, -1])
        assert weights[:2].max() < 0.6 * weights[2:].min()
        expected = flat.mean() + flat.std(axis=1).mean() * (weights[:, None] / weights.mean() * unit).mean(axis=0)
        numpy.testing.assert_allclose(found[b].flatten().numpy(), expected, atol=2e-3 * flat.std())


def test_the_median_leaves_an_outlier_out_where_it_is_wrong():
    depth, members, _, _ = _members(5)
    spoiled = members.clone()
    spoiled[2, :, 4:8, 4:8] += 3.0
    median, mean = (merged(spoiled, reduction).depth for reduction in ("median", "mean"))
    assert all(_error(median[b], depth[b]) < 0.5 * _error(mean[b], depth[b]) for b in range(len(depth)))


def test_the_uncertainty_is_where_the_members_disagree():
    _, members, scales, _ = _members(5, 0.01)
    draw = torch.Generator().manual_seed(4)
    members[:, :, :, 16:] += 0.3 * scales * torch.randn(5, 2, 24, 16, generator=draw, dtype=torch.float64)
    for reduction in ("median", "mean"):
        uncertainty = merged(members, reduction).uncertainty
        assert (uncertainty[:, :, 16:].mean() / uncertainty[:, :, :16].mean()) > 5


def test_uncertainties_are_their_definitions():
    """Members of one level and spread, symmetric to each other, stay as they are."""
    base = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    away = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # no part along base or a constant
    members = torch.stack([base - 0.1 * away, base + 0.1 * away])[:, None]
    assert merged(members, "mean").uncertainty.numpy() == pytest.approx(0.1, abs=1e-9)
    assert merged(members, "median").uncertainty.numpy() == pytest.approx(0.1, abs=1e-9)
    assert merged(members, "mean").depth[0].numpy() == pytest.approx(base.numpy(), abs=1e-9)


def test_a_reversed_or_constant_member_does_no_harm():
    depth, members, _, _ = _members(5)
    for bad in (-members[0], torch.full_like(members[0], 7.0)):
        spoiled = torch.cat([members[:4], bad[None]])
        for reduction in ("median", "mean"):
            found = merged(spoiled, reduction).depth
            assert found.isfinite().all()
            assert all(_error(found[b], depth[b]) < 1e-6 for b in range(len(depth)))
            assert ((found[0] - found[0].mean()) * (depth[0] - depth[0].mean())).sum() > 0


def test_constant_members_stay_constant():
    members = torch.tensor([1.0, 2.0, 6.0]).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    depth, uncertainty = merged(members)
    assert depth.numpy() == pytest.approx(3.0) and uncertainty.numpy() == pytest.approx(0.0)


def test_one_member_is_returned_as_it_is():
    prediction = torch.randn(1, 2, 8, 8)
    depth, uncertainty = merged(prediction)
    assert torch.equal(depth, prediction[0]) and not uncertainty.any() and uncertainty.dtype == prediction.dtype


@pytest.mark.parametrize(
    ("predictions", "reduction", "message"),
    [
        (torch.zeros(2, 4, 4), "mean", "must be"),
        (torch.zeros(0, 1, 4, 4), "mean", "at least one member"),
        (torch.zeros(2, 1, 4, 4), "mode", "reduction must be one of median, mean, not 'mode'"),
        (torch.full((2, 1, 2, 2), float("nan")), "mean", "8 values that are not finite"),
    ],
)
def test_wrong_predictions_are_named(predictions, reduction, message):
    with pytest.raises(ValueError, match=message):
        merged(predictions, reduction)


def test_flicker():
    frames = torch.stack([torch.full((4, 4), value) for value in (0.0, 0.5, 0.25)])
    assert flicker(frames) == pytest.approx((0.5 + 0.25) / 2)
    assert flicker(frames[:1].expand(3, 4, 4)) == 0.0
    with pytest.raises(ValueError, match="at least 2 frames"):
        flicker(frames[:1])
