"""Time grids: ends, order, shapes, shift, errors."""

import math

import pytest
import torch

from diff2flow_nodes.samplers import SHAPES, shift_time, time_grid, u_shaped

every_shape = pytest.mark.parametrize("shape", SHAPES)


@every_shape
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 50.0])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0640425, 1.0), (0.1, 0.7)])
def test_ends_are_exact_and_times_increase(shape, steps, shift, start, end):
    times = time_grid(steps, shape, start, end, shift)
    assert times.shape == (steps + 1,) and times.dtype == torch.float64
    assert times[0].item() == start and times[-1].item() == end
    assert (times.diff() > 0).all()


def test_the_contract_names_three_shapes():
    assert list(SHAPES) == ["uniform", "cosine", "u_shaped"]


def test_uniform_is_uniform_and_the_default():
    torch.testing.assert_close(time_grid(4), torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))


def test_cosine_is_dense_near_noise():
    times = time_grid(10, "cosine")
    assert (times.diff().diff() > 0).all()
    assert times[5].item() == pytest.approx(1 - math.cos(math.pi / 4))


def test_u_shape_is_dense_at_both_ends_and_symmetric():
    times = time_grid(11, "u_shaped")
    gaps = times.diff()
    torch.testing.assert_close(gaps, gaps.flip(0))
    assert (gaps[:6].diff() > 0).all() and gaps[5] > 3 * gaps[0]


def test_u_shape_is_the_quantile_function_of_its_density():
    """The mass of e^{4t} + e^{4(1-t)} is the same between all neighbours, by quadrature."""
    t = torch.linspace(0, 1, 400_001, dtype=torch.float64)
    density = torch.exp(4 * t) + torch.exp(4 * (1 - t))
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, t)])
    share = mass / mass[-1]
    u = torch.linspace(0, 1, 41, dtype=torch.float64)
    at = (u_shaped(u) * 400_000).round().long()
    torch.testing.assert_close(share[at], u, rtol=0, atol=1e-5)


@every_shape
def test_shift_is_sd3s_on_sigma(shape):
    for shift in (0.5, 3.0):
        sigma = 1 - time_grid(20, shape)
        expected = 1 - shift * sigma / (1 + (shift - 1) * sigma)
        torch.testing.assert_close(time_grid(20, shape, shift=shift), expected)


@every_shape
def test_a_larger_shift_spends_more_steps_near_noise(shape):
    below_half = [(time_grid(100, shape, shift=shift) < 0.5).sum().item() for shift in (0.5, 1.0, 3.0, 6.0)]
    assert below_half == sorted(set(below_half))


def test_shift_acts_within_the_interval():
    expected = 0.2 + 0.6 * time_grid(9, "u_shaped", shift=3.0)
    torch.testing.assert_close(time_grid(9, "u_shaped", start=0.2, end=0.8, shift=3.0), expected)


def test_shifts_multiply():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 3.0), shift_time(t, 6.0))
    torch.testing.assert_close(shift_time(t, 1.0), t)


@pytest.mark.parametrize(
    ("arguments", "offender"),
    [
        ({"steps": 0}, "0"),
        ({"steps": -2}, "-2"),
        ({"steps": 2.0}, "2.0"),
        ({"steps": True}, "True"),
        ({"shape": "karras"}, "'karras'"),
        ({"start": -0.1}, "-0.1"),
        ({"end": 1.01}, "1.01"),
        ({"start": 0.5, "end": 0.5}, "start=0.5, end=0.5"),
        ({"start": 0.8, "end": 0.2}, "start=0.8, end=0.2"),
        ({"start": math.nan}, "nan"),
        ({"shift": 0.0}, "0.0"),
        ({"shift": -1.0}, "-1.0"),
        ({"shift": math.nan}, "nan"),
        ({"shift": math.inf}, "inf"),
    ],
)
def test_errors_name_the_value(arguments, offender):
    with pytest.raises(ValueError, match=offender):
        time_grid(**{"steps": 4, **arguments})
