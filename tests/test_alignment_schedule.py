"""Noise schedules: their tables against independent formulas, what they refuse, equality and description."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from diff2flow_nodes.alignment import NoiseSchedule

COMFY_STAND_IN = 4.8973451890853435e-08


def test_scaled_linear_is_stable_diffusions():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    schedule = NoiseSchedule.scaled_linear()
    assert schedule.kind == "vp" and schedule.steps == 1000
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-12)
    assert schedule.alphas_cumprod.dtype == torch.float64


def test_linear_is_ddpms():
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(NoiseSchedule.linear().alphas_cumprod.numpy(), expected, rtol=1e-12)


def test_cosine_is_nichol_and_dhariwals_with_the_clip():
    level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    found = NoiseSchedule.cosine().alphas_cumprod.numpy()
    np.testing.assert_allclose(found[:-1], (level[1:] / level[0])[:-1], rtol=1e-10)
    assert found[-1] / found[-2] == pytest.approx(0.001, rel=1e-10)


def test_from_betas_multiplies():
    assert NoiseSchedule.from_betas([0.1, 0.5, 1.0]).alphas_cumprod.tolist() == pytest.approx([0.9, 0.45, 0.0])


def test_sigmas_and_flow_times_of_ve():
    schedule = NoiseSchedule.from_sigmas([0.5, 1.0, 3.0])
    assert schedule.kind == "ve"
    torch.testing.assert_close(schedule.flow_times, torch.tensor([2 / 3, 0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.8, 0.5, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, tuple])
def test_values_come_as_tensor_array_or_sequence(make):
    assert NoiseSchedule.from_alphas_cumprod(make([0.9, 0.5])).values == pytest.approx((0.9, 0.5))


def test_zero_terminal_snr_keeps_the_first_and_ends_on_zero():
    base = NoiseSchedule.scaled_linear()
    schedule = base.zero_terminal_snr()
    assert schedule.values[-1] == 0 and schedule.values[0] == pytest.approx(base.values[0], rel=1e-12)
    alphas, base_alphas = schedule.alphas_cumprod.sqrt(), base.alphas_cumprod.sqrt()
    slopes = alphas.diff() / base_alphas.diff()
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes))
    assert schedule.zero_terminal_snr() == schedule


def test_which_schedules_have_zero_terminal_snr():
    rescaled = NoiseSchedule.scaled_linear().zero_terminal_snr().alphas_cumprod
    for stand_in in (0.0, COMFY_STAND_IN, 2.0**-24):
        values = torch.cat([rescaled[:-1], torch.tensor([stand_in], dtype=torch.float64)])
        assert NoiseSchedule.from_alphas_cumprod(values).is_zero_terminal_snr
        assert NoiseSchedule.from_alphas_cumprod(values.float()).is_zero_terminal_snr
    for schedule in (NoiseSchedule.scaled_linear(), NoiseSchedule.linear(), NoiseSchedule.cosine()):
        assert not schedule.is_zero_terminal_snr
    assert not NoiseSchedule.from_alphas_cumprod(NoiseSchedule.cosine().alphas_cumprod.float()).is_zero_terminal_snr
    assert not NoiseSchedule.from_sigmas([0.002, 80.0]).is_zero_terminal_snr


def test_ve_has_no_zero_terminal_snr():
    with pytest.raises(ValueError, match="'ve'"):
        NoiseSchedule.from_sigmas([1.0, 2.0]).zero_terminal_snr()


@pytest.mark.parametrize(
    ("values", "offender"),
    [
        ([0.9], "1"),
        ([], "0"),
        ([0.9, math.nan], "nan"),
        ([math.inf, 0.5], "inf"),
        ([1.0, 0.5], "1.0"),
        ([0.9, -0.25], "-0.25"),
        ([0.5, 0.75], "0.75"),
        ([0.9, 0.5, 0.5], "0.5 at index 2"),
        ([[0.9, 0.5]], r"\(1, 2\)"),
    ],
)
def test_bad_alphas_cumprod_are_named(values, offender):
    with pytest.raises(ValueError, match=offender):
        NoiseSchedule.from_alphas_cumprod(values)


@pytest.mark.parametrize(
    ("values", "offender"),
    [([0.0, 1.0], "0.0"), ([1.0, math.inf], "inf"), ([2.0, 1.5], "1.5"), ([1e-20, 2e-20], "1e-20"), ([1.0], "1")],
)
def test_bad_sigmas_are_named(values, offender):
    with pytest.raises(ValueError, match=offender):
        NoiseSchedule.from_sigmas(values)


@pytest.mark.parametrize(("betas", "offender"), [([0.1, 0.0], "0.0"), ([0.1, 1.5], "1.5"), ([1.0, 0.1], "0.0")])
def test_bad_betas_are_named(betas, offender):
    with pytest.raises(ValueError, match=offender):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize("steps", [1, 0, -3, 2.5, True, "1000"])
@pytest.mark.parametrize("make", [NoiseSchedule.scaled_linear, NoiseSchedule.linear, NoiseSchedule.cosine])
def test_bad_steps_are_named(make, steps):
    with pytest.raises(ValueError, match=str(steps)):
        make(steps)


@pytest.mark.parametrize(("start", "end"), [(0.02, 0.01), (0.0, 0.01), (0.01, 1.0), (math.nan, 0.01)])
def test_bad_beta_range_is_named(start, end):
    for make in (NoiseSchedule.scaled_linear, NoiseSchedule.linear):
        with pytest.raises(ValueError, match=f"start={start}, end={end}"):
            make(1000, start, end)


def test_unknown_kind():
    with pytest.raises(ValueError, match="'edm'"):
        NoiseSchedule("edm", (0.9, 0.5), "x")


def test_equality_is_by_kind_and_values():
    base = NoiseSchedule.scaled_linear()
    same = NoiseSchedule.from_alphas_cumprod(base.alphas_cumprod)
    assert base == same and hash(base) == hash(same)
    assert base != NoiseSchedule.linear()
    assert NoiseSchedule.from_sigmas([0.1, 0.5]) != NoiseSchedule.from_alphas_cumprod([0.5, 0.1])


def test_a_schedule_cannot_be_changed():
    schedule = NoiseSchedule.scaled_linear()
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.kind = "ve"
    before = schedule.values
    schedule.alphas_cumprod.zero_()
    assert schedule.values is before and schedule.alphas_cumprod.min() > 0


def test_descriptions():
    assert NoiseSchedule.scaled_linear().describe() == "scaled_linear(1000, 0.00085, 0.012)"
    assert NoiseSchedule.linear().describe() == "linear(1000, 0.0001, 0.02)"
    assert NoiseSchedule.cosine(500).describe() == "cosine(500)"
    ztsnr = NoiseSchedule.scaled_linear().zero_terminal_snr().describe()
    assert ztsnr == "zero_terminal_snr(scaled_linear(1000, 0.00085, 0.012))"
    given = NoiseSchedule.from_alphas_cumprod([0.9, 0.5]).describe()
    assert given == "alphas_cumprod(sha256:fd8f1d9bb02a)"  # stable: it is written into files
    assert given == NoiseSchedule.from_alphas_cumprod([0.9 * (1 + 1e-14), 0.5]).describe()
    assert given != NoiseSchedule.from_alphas_cumprod([0.9001, 0.5]).describe()
    assert NoiseSchedule.from_sigmas([0.5, 0.9]).describe().startswith("sigmas(sha256:")
