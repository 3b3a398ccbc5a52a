"""Log-depth pictures: exact inside the percentiles, clipped outside, far where nothing is valid."""

import numpy
import pytest
import torch

from diff2flow_nodes.depth.codec import decode, encode, latent_mask, valid_pixels


def _scenes(dtype=torch.float32):
    """Three images of depths over four decades."""
    draw = torch.Generator().manual_seed(3)
    depth = torch.exp(torch.rand(3, 40, 56, generator=draw, dtype=torch.float64) * 9.0 - 3.0)
    depth[1] *= 40.0
    valid = torch.rand(3, 40, 56, generator=draw) > 0.2
    return depth.to(dtype), valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_round_trip_is_exact_inside_the_percentiles(dtype):
    depth, valid = _scenes(dtype)
    picture, low, high = encode(depth, valid)
    again = decode(picture, low, high)
    log = depth.double().log()
    inside = valid & (log >= low[:, None, None]) & (log <= high[:, None, None])
    assert inside.sum() > 0.95 * valid.sum() and again.dtype == picture.dtype == dtype
    relative = ((again - depth) / depth).abs()
    assert relative[inside].max() <= 1e-5
    beyond = valid & ~inside
    assert beyond.any() and relative[beyond].max() > 1e-3  # clipped: the percentiles do something


def test_the_bounds_are_the_percentiles_of_the_valid_log_depth():
    depth, valid = _scenes()
    picture, low, high = encode(depth, valid)
    for i in range(3):
        expected = numpy.quantile(numpy.log(depth[i][valid[i]].double().numpy()), [0.01, 0.99])
        numpy.testing.assert_allclose([low[i], high[i]], expected, rtol=1e-12, atol=1e-12)
        below = valid[i] & (depth[i].double().log() < low[i])
        above = valid[i] & (depth[i].double().log() > high[i])
        assert below.any() and above.any() and (picture[i][below] == -1).all() and (picture[i][above] == 1).all()
    assert picture.shape == (3, 40, 56, 3) and picture.abs().max() == 1
    assert torch.equal(picture[..., 0], picture[..., 1]) and torch.equal(picture[..., 0], picture[..., 2])


def test_a_picture_is_worked_out_by_hand():
    """Logs 0, 0.1, ... 10: the 1st percentile is 0.1, the 99th 9.9."""
    depth = torch.exp(torch.arange(101, dtype=torch.float64) / 10).reshape(1, 1, 101)
    picture, low, high = encode(depth, depth > 0)
    assert float(low) == pytest.approx(0.1) and float(high) == pytest.approx(9.9)
    assert picture[0, 0, [0, 1, 30, 50, 99, 100], 0].tolist() == pytest.approx([-1, -1, 2 * 2.9 / 9.8 - 1, 0, 1, 1])


def test_invalid_pixels_are_far_and_without_influence():
    depth, valid = _scenes()
    spoiled = torch.where(valid, depth, torch.tensor([float("nan"), float("inf"), -5.0, 0.0])[torch.arange(56) % 4])
    kept, broken = encode(depth, valid), encode(spoiled, valid)
    assert all(torch.equal(a, b) for a, b in zip(kept, broken, strict=True))
    assert (kept.picture[~valid] == 1).all()


def test_images_do_not_mix():
    depth, valid = _scenes()
    together, alone = encode(depth, valid), encode(depth[1:2], valid[1:2])
    assert torch.equal(together.picture[1], alone.picture[0]) and together.low[1] == alone.low[0]


@pytest.mark.parametrize("metres", [1e-3, 0.1, 2.7, 31415.9])
def test_constant_depth_comes_back_exactly(metres):
    depth = torch.full((2, 8, 8), metres)
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[0, 0, 0] = False
    picture, low, high = encode(depth, valid)
    assert (picture[valid] == 0).all() and (picture[~valid] == 1).all() and torch.equal(low, high)
    assert torch.equal(decode(picture, low, high), depth)


def test_decoding_takes_the_mean_of_the_channels():
    picture = torch.tensor([-0.3, 0.0, 0.6]).reshape(1, 1, 1, 3)
    [[[metres]]] = decode(picture, torch.tensor([0.0]), torch.tensor([2.0]))
    assert float(metres) == pytest.approx(numpy.exp(1.1))


def test_valid_pixels():
    depth = torch.tensor([1.0, 0.0, -1.0, float("nan"), float("inf"), -float("inf"), 80.0, 79.99])
    assert valid_pixels(depth).tolist() == [True, False, False, False, False, False, True, True]
    assert valid_pixels(depth, 80.0).tolist() == [True, False, False, False, False, False, False, True]


def test_a_latent_is_valid_where_all_its_pixels_are():
    valid = torch.ones(2, 16, 24, dtype=torch.bool)
    valid[0, 7, 8] = False
    valid[1, 8:, :16] = False
    expected = torch.ones(2, 1, 2, 3)
    expected[0, 0, 0, 1] = 0
    expected[1, 0, 1, :2] = 0
    assert torch.equal(latent_mask(valid), expected)
    assert latent_mask(valid, 4).sum() == 2 * 4 * 6 - 1 - 2 * 4


@pytest.mark.parametrize(
    ("depth", "valid", "message"),
    [
        (torch.ones(2, 4, 4), torch.ones(2, 4, 5) > 0, r"must both be \(B, H, W\).*\(2, 4, 4\) and \(2, 4, 5\)"),
        (torch.ones(4, 4), torch.ones(4, 4) > 0, r"must both be \(B, H, W\)"),
        (torch.ones(2, 4, 4), torch.tensor([1, 0]).reshape(2, 1, 1).expand(2, 4, 4) > 0, "no valid pixel in image 2"),
        (torch.full((1, 2, 2), -3.0), torch.ones(1, 2, 2) > 0, "4 valid pixels.*no positive.*-3"),
        (torch.full((1, 2, 2), float("nan")), torch.ones(1, 2, 2) > 0, "4 valid pixels.*nan"),
    ],
)
def test_what_cannot_be_encoded_is_named(depth, valid, message):
    with pytest.raises(ValueError, match=message):
        encode(depth, valid)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="multiples of 8"):
        latent_mask(torch.ones(1, 12, 16) > 0)
    with pytest.raises(ValueError, match="low and high"):
        decode(torch.zeros(2, 4, 4, 3), torch.zeros(1), torch.zeros(1))
