"""The maps of time and state: ranges, inverses, shapes, dtypes, devices, errors."""

import pytest
import torch

from diff2flow_nodes.alignment import Alignment, NoiseSchedule

SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero_terminal_snr": NoiseSchedule.scaled_linear().zero_terminal_snr(),
    "ve": NoiseSchedule.from_sigmas(torch.logspace(-2.7, 1.9, 1000, dtype=torch.float64)),
    "two_steps": NoiseSchedule.from_alphas_cumprod([0.9, 0.2]),
}
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def test_the_covered_range_of_stable_diffusion():
    assert Alignment(NoiseSchedule.scaled_linear()).t_range == pytest.approx((0.0640425, 0.9716595), abs=1e-6)


@by_schedule
def test_integer_timesteps_sit_on_their_own_level(schedule):
    """tau = i belongs to alphas_cumprod[i]: f_t(i) = alpha/(alpha+sigma), with no offset."""
    alignment = Alignment(schedule, "v")
    tau = torch.arange(schedule.steps)
    level = torch.tensor(schedule.values, dtype=torch.float64)
    alpha, sigma = (level.sqrt(), (1 - level).sqrt()) if schedule.kind == "vp" else (torch.ones_like(level), level)
    t = alpha / (alpha + sigma)
    torch.testing.assert_close(alignment.flow_time(tau), t, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(alignment.timestep(t), tau.double(), rtol=0, atol=1e-9)
    assert alignment.flow_time(tau)[[-1, 0]].tolist() == list(alignment.t_range)


@by_schedule
def test_timestep_inverts_flow_time(schedule):
    alignment = Alignment(schedule, "v")
    last = schedule.steps - 1
    tau = torch.linspace(0, last, 20011, dtype=torch.float64)
    t = alignment.flow_time(tau)
    assert (t.diff() < 0).all()
    assert (alignment.timestep(t) - tau).abs().max() <= 1e-9 * schedule.steps
    t = torch.linspace(*alignment.t_range, 20011, dtype=torch.float64)
    torch.testing.assert_close(alignment.flow_time(alignment.timestep(t)), t, rtol=0, atol=1e-14)


def test_both_time_maps_are_linear_between_neighbours():
    alignment = Alignment(NoiseSchedule.scaled_linear())
    low, high = alignment.flow_time(torch.tensor([501.0, 500.0], dtype=torch.float64))
    assert alignment.flow_time(torch.tensor(500.25, dtype=torch.float64)) == pytest.approx(0.75 * high + 0.25 * low)
    assert alignment.timestep(0.75 * high + 0.25 * low) == pytest.approx(500.25, abs=1e-9)


@by_schedule
def test_state_round_trip(schedule):
    alignment = Alignment(schedule, "v")
    tau = torch.linspace(0, schedule.steps - 1, 257, dtype=torch.float64)
    for dtype, bound in ((torch.float64, 1e-15), (torch.float32, 3e-7)):
        x_diff = torch.randn(257, 4, 3, 5, dtype=dtype)
        x_flow = alignment.to_flow(x_diff, tau)
        back = alignment.to_diffusion(x_flow, alignment.flow_time(tau))
        assert ((back - x_diff).abs() <= bound * x_diff.abs()).all() and back.dtype == dtype


@by_schedule
def test_the_two_states_are_the_same_mixture(schedule):
    """x_diff = alpha·x_data + sigma·x_noise maps to x_flow = t·x_data + (1-t)·x_noise."""
    alignment = Alignment(schedule, "v")
    tau = torch.linspace(0, schedule.steps - 1, 33, dtype=torch.float64)
    t = alignment.flow_time(tau)
    alpha, sigma = (c[:, None] for c in alignment.coefficients(t))
    x_data, x_noise = torch.randn(2, 33, 7, dtype=torch.float64)
    expected = t[:, None] * x_data + (1 - t[:, None]) * x_noise
    found = alignment.to_flow(alpha * x_data + sigma * x_noise, tau)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_times_outside_their_range_are_clamped():
    alignment = Alignment(NoiseSchedule.scaled_linear())
    t_min, t_max = alignment.t_range
    assert alignment.timestep(torch.tensor([-1.0, 0.0, t_min, t_max, 1.0, 2.0])).tolist() == pytest.approx(
        [999, 999, 999, 0, 0, 0], abs=1e-3
    )
    assert alignment.flow_time(torch.tensor([-5, 0, 999, 2000])).tolist() == [t_max, t_max, t_min, t_min]
    x = torch.randn(4, 3)
    assert torch.equal(alignment.to_flow(x, torch.tensor(-5.0)), alignment.to_flow(x, torch.tensor(0.0)))
    assert torch.equal(alignment.to_diffusion(x, torch.tensor(1.5)), alignment.to_diffusion(x, torch.tensor(1.0)))


def test_nan_stays_nan():
    alignment = Alignment(NoiseSchedule.scaled_linear())
    nan = torch.tensor([float("nan"), 0.5])
    x = torch.ones(2, 3)
    for result in (alignment.timestep(nan), alignment.flow_time(nan), alignment.velocity(x, 2 * x, nan).sum(1)):
        assert result.isnan().tolist() == [True, False]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("dims", [(), (7,), (4, 8, 8), (4, 3, 8, 8)])
def test_a_batch_of_times_is_each_item_by_itself(prediction, dims):
    alignment = Alignment(NoiseSchedule.scaled_linear(), prediction)
    t = torch.tensor([0.0, 0.05, 0.3, 0.7, 0.99, 1.0])
    x, output = torch.randn(2, 6, *dims)
    tau = alignment.timestep(t)
    assert tau.shape == t.shape
    for i in range(6):
        one = slice(i, i + 1)
        assert torch.equal(alignment.timestep(t[i]), tau[i])
        assert torch.equal(alignment.to_diffusion(x, t)[one], alignment.to_diffusion(x[one], t[i]))
        assert torch.equal(alignment.to_flow(x, tau)[one], alignment.to_flow(x[one], tau[i]))
        assert torch.equal(alignment.velocity(output, x, t)[one], alignment.velocity(output[one], x[one], t[i]))


def test_dtype_of_times_and_states():
    alignment = Alignment(NoiseSchedule.scaled_linear())
    for given, result in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float64),
    ):
        assert alignment.timestep(torch.ones(2, dtype=given)).dtype == result
        assert alignment.flow_time(torch.ones(2, dtype=given)).dtype == result
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(2, 3).to(dtype)
        for t in (torch.tensor(0.5, dtype=torch.float64), torch.tensor([0.5, 1.0])):
            assert alignment.to_diffusion(x, t).dtype == dtype
            assert alignment.to_flow(x, t).dtype == dtype
            assert alignment.velocity(x.float(), x, t).dtype == dtype
    assert alignment.timestep(0.5) == alignment.timestep(torch.tensor(0.5, dtype=torch.float64))


def test_the_table_is_made_once_and_nothing_waits_for_the_device():
    """The meta device has no values: whatever would read one back, or copy a table back, fails there."""
    alignment = Alignment(NoiseSchedule.scaled_linear(), "v")
    t, x = torch.rand(3, device="meta"), torch.randn(3, 4, 8, 8, device="meta")
    velocity = alignment.velocity(alignment.to_diffusion(x, t), alignment.to_flow(x, alignment.timestep(t)), t)
    assert velocity.shape == x.shape
    tables = dict(alignment._tables)
    alignment.flow_time(alignment.timestep(t))
    alignment.timestep(torch.tensor(0.5))
    alignment.timestep(torch.tensor(0.6))
    assert alignment._tables[t.device] is tables[t.device] and len(alignment._tables) == 2


def test_devices_without_float64_compute_in_float32(monkeypatch):
    monkeypatch.setattr("diff2flow_nodes.alignment.precision.DEVICES_WITHOUT_FLOAT64", frozenset({"cpu"}))
    alignment = Alignment(NoiseSchedule.scaled_linear(), "v")
    t = torch.linspace(0, 1, 101)
    tau = alignment.timestep(t)
    assert tau.dtype == torch.float32 and alignment._tables[t.device].dtype == torch.float32
    assert {c.dtype for c in alignment.coefficients(t)} == {torch.float32}
    monkeypatch.undo()
    torch.testing.assert_close(tau, Alignment(NoiseSchedule.scaled_linear(), "v").timestep(t), rtol=0, atol=1e-3)


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        alignment = Alignment(NoiseSchedule.scaled_linear(), "eps")
        alignment.timestep(torch.tensor(0.5))
    assert not alignment._tables[torch.device("cpu")].is_inference()
    weight = torch.ones(1, requires_grad=True)
    t, x_flow = torch.tensor([0.3, 0.6]), torch.randn(2, 4)
    output = alignment.to_diffusion(x_flow, t) * weight + alignment.timestep(t)[:, None] * weight
    alignment.velocity(output, x_flow, t).square().mean().backward()
    assert weight.grad.isfinite().all() and weight.grad.abs() > 0


def test_eps_refuses_zero_terminal_snr():
    ztsnr = NoiseSchedule.scaled_linear().zero_terminal_snr()
    comfy = torch.cat([ztsnr.alphas_cumprod[:-1], torch.tensor([4.8973451890853435e-08], dtype=torch.float64)])
    for schedule in (ztsnr, NoiseSchedule.from_alphas_cumprod(comfy), NoiseSchedule.from_alphas_cumprod(comfy.float())):
        with pytest.raises(ValueError, match="zero-terminal-SNR.*choose v or x0"):
            Alignment(schedule, "eps")
        assert Alignment(schedule, "v").t_range[0] < 1e-3
    with pytest.raises(ValueError, match="0.0005"):
        Alignment(NoiseSchedule.from_sigmas([0.1, 1999.0]), "eps")


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="'epsilon'"):
        Alignment(NoiseSchedule.scaled_linear(), "epsilon")
    alignment = Alignment(NoiseSchedule.scaled_linear())
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(2, 3\)"):
        alignment.velocity(torch.zeros(2, 6), x, torch.tensor(0.5))
    with pytest.raises(ValueError, match="3 times for a batch of 2"):
        alignment.to_diffusion(x, torch.rand(3))
    for call in (alignment.timestep, alignment.flow_time, lambda t: alignment.to_flow(x, t)):
        with pytest.raises(ValueError, match=r"\(2, 1\)"):
            call(torch.rand(2, 1))


def test_an_alignment_says_what_it_is():
    alignment = Alignment(NoiseSchedule.cosine(), "v")
    assert repr(alignment) == "Alignment(cosine(1000), prediction='v')"
    assert alignment.schedule == NoiseSchedule.cosine() and alignment.prediction == "v"
    with pytest.raises(AttributeError):
        alignment.prediction = "eps"
