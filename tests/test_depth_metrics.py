"""Depth metrics against plain numpy, image by image."""

import numpy
import pytest
import torch

from diff2flow_nodes.depth.metrics import depth_metrics, fitted


def _by_numpy(prediction, truth, valid, space):
    """AbsRel, delta1, RMSE and the number of pixels, written out; and the fitted depths."""
    rows, fits, pixels = [], [], 0
    for p, t, mask in zip(prediction, truth, valid, strict=True):
        keep = [(p[i, j], t[i, j]) for i, j in numpy.ndindex(*t.shape) if mask[i, j] and 0 < t[i, j] < numpy.inf]
        x, y = numpy.array(keep).T
        goal = {"log": numpy.log(y), "depth": y, "disparity": 1 / y}[space]
        solution = numpy.linalg.lstsq(numpy.stack([x, numpy.ones_like(x)], axis=1), goal, rcond=None)[0]
        fit = solution[0] * p + solution[1]
        fit = numpy.exp(fit) if space == "log" else numpy.maximum(fit, 0.1 * goal.min())
        fit = 1 / fit if space == "disparity" else fit
        z = numpy.array([fit[i, j] for i, j in numpy.ndindex(*t.shape) if mask[i, j] and 0 < t[i, j] < numpy.inf])
        right = sum(max(a / b, b / a) < 1.25 for a, b in zip(z, y, strict=True)) / len(y)
        rows.append((numpy.mean(abs(z - y) / y), right, numpy.sqrt(numpy.mean((z - y) ** 2))))
        fits.append(fit)
        pixels += len(y)
    return numpy.mean(rows, axis=0), pixels, numpy.stack(fits)


def _case(name):
    draw = numpy.random.default_rng(11)
    truth = numpy.exp(draw.uniform(-0.5, 3.5, (3, 18, 22)))
    prediction = 0.2 * numpy.log(truth) + 0.1 + 0.05 * draw.standard_normal(truth.shape)
    valid = numpy.ones(truth.shape, bool)
    if name == "masks":
        valid = draw.random(truth.shape) > numpy.array([0.1, 0.5, 0.95])[:, None, None]
    if name == "nan":
        truth[0, :5], truth[1, 3, 3], truth[2, :, 7], truth[1, 0] = numpy.nan, numpy.inf, 0.0, -2.0
        valid = draw.random(truth.shape) > 0.3
    if name == "constant truth":
        truth[1] = 4.2
    if name == "constant prediction":
        prediction[:] = numpy.array([0.37, 0.0, 1e4])[:, None, None]
    if name == "far":  # fits that would be negative somewhere
        prediction += 3.0 * draw.standard_normal(truth.shape) * (draw.random(truth.shape) > 0.9)
        prediction[:, 0, 0] = [-30.0, 30.0, 5.0]
    return prediction.astype(numpy.float32), truth.astype(numpy.float32), valid


CASES = ["plain", "masks", "nan", "constant truth", "constant prediction", "far"]


@pytest.mark.parametrize("space", ["log", "depth", "disparity"])
@pytest.mark.parametrize("case", CASES)
def test_numpy_agrees(case, space):
    prediction, truth, valid = _case(case)
    (abs_rel, delta1, rmse), pixels, fits = _by_numpy(prediction.astype(float), truth.astype(float), valid, space)
    tensors = [torch.from_numpy(array) for array in (prediction, truth, valid)]
    depth = fitted(*tensors, space)
    found = depth_metrics(depth, *tensors[1:])
    numpy.testing.assert_allclose(depth.numpy(), fits, rtol=1e-8)
    assert found["abs_rel"] == pytest.approx(abs_rel, rel=1e-8) and found["rmse"] == pytest.approx(rmse, rel=1e-8)
    assert found["delta1"] == pytest.approx(delta1, abs=1e-12) and found["pixels"] == pixels
    if case == "nan":
        assert pixels < valid.sum()


@pytest.mark.parametrize("space", ["log", "depth", "disparity"])
def test_an_affine_map_of_the_truth_is_perfect(space):
    truth = torch.exp(torch.rand(2, 12, 12, dtype=torch.float64) * 4)
    target = {"log": truth.log(), "depth": truth, "disparity": 1 / truth}[space]
    found = depth_metrics(fitted(-0.3 * target + 5.0, truth, None, space), truth)
    assert found["abs_rel"] < 1e-10 and found["delta1"] == 1.0 and found["rmse"] < 1e-9 and found["pixels"] == 288


def test_numbers_by_hand():
    truth = torch.tensor([[[1.0, 2.0, 4.0, float("nan")]], [[2.0, 2.0, 0.0, 2.0]]])
    prediction = torch.tensor([[[1.2, 2.0, 2.0, 9.0]], [[3.0, 2.0, 9.0, 2.0]]])
    found = depth_metrics(prediction, truth, torch.ones(2, 1, 4, dtype=torch.bool))
    assert found["abs_rel"] == pytest.approx(((0.2 + 0 + 0.5) / 3 + 0.5 / 3) / 2, rel=1e-6)
    assert found["delta1"] == pytest.approx(2 / 3)
    assert found["rmse"] == pytest.approx((((0.04 + 4) / 3) ** 0.5 + (1 / 3) ** 0.5) / 2, rel=1e-6)
    assert found["pixels"] == 6


def test_images_count_alike_whatever_their_pixels():
    truth = torch.ones(2, 10, 10)
    prediction = torch.stack([torch.full((10, 10), 1.0), torch.full((10, 10), 2.0)])
    valid = torch.zeros(2, 10, 10, dtype=torch.bool)
    valid[0], valid[1, 0, 0] = True, True
    assert depth_metrics(prediction, truth, valid)["abs_rel"] == pytest.approx(0.5)


def test_what_is_masked_out_has_no_influence():
    prediction, truth, valid = (torch.from_numpy(array) for array in _case("masks"))
    other_truth = torch.where(valid, truth, torch.full_like(truth, 1e5))
    other_prediction = torch.where(valid, prediction, torch.full_like(prediction, 1e6))
    for space in ("log", "depth", "disparity"):
        first = depth_metrics(fitted(prediction, truth, valid, space), truth, valid)
        second = depth_metrics(fitted(other_prediction, other_truth, valid, space), other_truth, valid)
        assert first == pytest.approx(second, rel=1e-9)


@pytest.mark.parametrize("function", [fitted, depth_metrics])
def test_wrong_inputs_are_named(function):
    good, all_valid = torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    broken = good.clone()
    broken[0, 0, :3] = float("nan")
    cases = [
        ((broken, good, all_valid), "prediction has 3 values that are NaN"),
        ((good, good[:, :2], all_valid), r"of one size, not prediction \(2, 3, 4\), truth \(2, 2, 4\)"),
        ((good, good, all_valid[:1]), r"valid \(1, 3, 4\)"),
        ((good, good * float("nan"), all_valid), "no valid pixel in image 1 of 2"),
        ((good, good, all_valid & (torch.arange(2) == 0)[:, None, None]), "no valid pixel in image 2 of 2"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            function(*inputs)


def test_unknown_spaces_and_unfitted_predictions_are_named():
    good = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match="space must be one of log, depth, disparity, not 'inverse'"):
        fitted(good, good, None, "inverse")
    with pytest.raises(ValueError, match="12 pixels that are not positive.*fit it"):
        depth_metrics(good * 0, good)
