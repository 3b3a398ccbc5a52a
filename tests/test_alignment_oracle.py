"""The velocity against a Gaussian whose perfect network and perfect flow are known in closed form.

Data N(MEAN, STD²), noise N(0, 1). The network sees x_diff = alpha·x_data + sigma·eps with the exact coefficients,
written here independently of the package, and returns the conditional expectation of what it predicts. The flow's
velocity is E[x_data - x_noise | x_flow]. MEAN is not 0 so that the velocity vanishes nowhere and its relative error
means something at every t.
"""

import pytest
import torch

from diff2flow_nodes.alignment import Alignment, NoiseSchedule

MEAN, STD = 0.4, 0.5

SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero_terminal_snr": NoiseSchedule.scaled_linear().zero_terminal_snr(),
    "ve": NoiseSchedule.from_sigmas(torch.logspace(-2.7, 1.9, 1000, dtype=torch.float64)),  # 0.002 to 79
}
CASES = [
    (name, prediction)
    for name in SCHEDULES
    for prediction in ("eps", "v", "x0")
    if (name, prediction) != ("zero_terminal_snr", "eps")
]


def over(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1)) if values.ndim else values


def exact_coefficients(t, kind):
    if kind == "ve":
        return torch.ones_like(t), 1 / t - 1
    n = (t**2 + (1 - t) ** 2).sqrt()
    return t / n, (1 - t) / n


def network(x_diff, t, prediction, kind, mean=MEAN):
    """The perfect network at flow time t (float64), computed in x_diff's dtype."""
    alpha, sigma = (over(c, x_diff).to(x_diff.dtype) for c in exact_coefficients(t, kind))
    gain = (x_diff - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
    x_data, eps = mean + alpha * STD**2 * gain, sigma * gain
    return {"eps": eps, "v": alpha * eps - sigma * x_data, "x0": x_data}[prediction]


def exact_velocity(x_flow, t, mean=MEAN):
    x, t = x_flow.double(), over(t, x_flow)
    return mean + (t * STD**2 - (1 - t)) / (t**2 * STD**2 + (1 - t) ** 2) * (x - t * mean)


def state(t, dims, dtype):
    """x_flow at each of the times, distributed as the flow has it."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(t), *dims)
    x_data = MEAN + STD * torch.randn(shape, generator=generator, dtype=torch.float64)
    x_noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    time = over(t, x_data)
    return (time * x_data + (1 - time) * x_noise).to(dtype)


def relative_error(found, expected):
    difference = (found.double() - expected).flatten(1).norm(dim=1)
    return difference / expected.flatten(1).norm(dim=1)


def velocity_error(name, prediction, t, dims, dtype):
    schedule = SCHEDULES[name]
    alignment = Alignment(schedule, prediction)
    x_flow = state(t, dims, dtype)
    x_diff = alignment.to_diffusion(x_flow, t)
    output = network(x_diff, t, prediction, schedule.kind)
    velocity = alignment.velocity(output, x_flow, t)
    assert velocity.dtype == x_flow.dtype and velocity.shape == x_flow.shape
    return relative_error(velocity, exact_velocity(x_flow, t))


def amplification(prediction, t):
    """By how much the network's own rounding grows in the velocity."""
    return {"eps": 1 / t, "v": torch.ones_like(t), "x0": 1 / (1 - t)}[prediction]


@pytest.mark.parametrize("dims", [(4, 4, 4), (4, 3, 2, 4)], ids=["4-D", "5-D"])
@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_velocity_is_exact_in_the_covered_range(name, prediction, dims):
    t_min, t_max = Alignment(SCHEDULES[name], prediction).t_range
    t = torch.linspace(t_min, t_max, 800, dtype=torch.float64)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        # An eps network on the cosine schedule divides by t_min = 5e-5: there no bound can be tighter than the
        # rounding of its output divided by t. For Stable Diffusion the plain bound rules everywhere.
        bounds = (2 * torch.finfo(dtype).eps * amplification(prediction, t)).clamp(min=bound)
        error = velocity_error(name, prediction, t, dims, dtype)
        worst = (error / bounds).argmax()
        assert (error <= bounds).all(), f"{dtype}: {error[worst]:.2g} at t = {t[worst]:.6f}"


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_stable_diffusion_meets_the_plain_bounds(prediction):
    t = torch.linspace(*Alignment(SCHEDULES["scaled_linear"], prediction).t_range, 4001, dtype=torch.float64)
    assert velocity_error("scaled_linear", prediction, t, (4, 4, 4), torch.float64).max() <= 1e-12
    assert velocity_error("scaled_linear", prediction, t, (4, 4, 4), torch.float32).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """Given exact float32 numbers that half precision holds, only the result is rounded."""
    alignment = Alignment(SCHEDULES["scaled_linear"], "v")
    x_flow = torch.tensor([[0.5, -1.25]], dtype=dtype)
    output = torch.tensor([[1.5, 0.75]], dtype=dtype)
    t = torch.tensor(0.3, dtype=torch.float64)
    expected = alignment.velocity(output.float(), x_flow.float(), t).to(dtype)
    assert torch.equal(alignment.velocity(output, x_flow, t), expected)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_finite_on_all_of_zero_to_one(name, prediction):
    alignment = Alignment(SCHEDULES[name], prediction)
    t_min, t_max = alignment.t_range
    ends = torch.tensor([0.0, t_min / 2, t_min, t_max, (1 + t_max) / 2, 1.0], dtype=torch.float64)
    t = torch.cat([torch.linspace(0, 1, 2001, dtype=torch.float64), ends])
    for dtype in (torch.float64, torch.float32):
        x_flow = state(t, (2, 2, 2), dtype)
        tau = alignment.timestep(t)
        x_diff = alignment.to_diffusion(x_flow, t)
        covered = t.clamp(t_min, t_max)
        output = network(x_diff, covered, prediction, SCHEDULES[name].kind)
        velocity = alignment.velocity(output, x_flow, t)
        assert x_diff.isfinite().all() and velocity.isfinite().all()
        assert tau.min() >= 0 and tau.max() <= alignment.schedule.steps - 1


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "ve"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_below_t_min_everything_is_evaluated_at_t_min(name, prediction):
    alignment = Alignment(SCHEDULES[name], prediction)
    t_min = torch.tensor(alignment.t_range[0], dtype=torch.float64)
    x_flow, output = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    for t in (torch.tensor(0.0, dtype=torch.float64), t_min / 3):
        assert torch.equal(alignment.to_diffusion(x_flow, t), alignment.to_diffusion(x_flow, t_min))
        assert torch.equal(alignment.velocity(output, x_flow, t), alignment.velocity(output, x_flow, t_min))
        assert alignment.timestep(t) == alignment.schedule.steps - 1
    if name == "scaled_linear":
        n = (t_min**2 + (1 - t_min) ** 2).sqrt()
        torch.testing.assert_close(alignment.to_diffusion(x_flow, t_min * 0), x_flow / n, rtol=1e-14, atol=0)
    if prediction == "eps":
        torch.testing.assert_close(alignment.velocity(output, x_flow, t_min * 0), (x_flow - output) / t_min)


def test_above_t_max_coefficients_keep_their_closed_form():
    alignment = Alignment(SCHEDULES["scaled_linear"], "eps")
    x_flow, output = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    for t in (0.98, 1.0):
        n = (t**2 + (1 - t) ** 2) ** 0.5
        time = torch.tensor(t, dtype=torch.float64)
        assert alignment.timestep(time) == 0
        torch.testing.assert_close(alignment.to_diffusion(x_flow, time), x_flow / n, rtol=1e-14, atol=0)
        torch.testing.assert_close(alignment.velocity(output, x_flow, time), (x_flow - output) / t)


def test_x0_velocity_lands_on_the_data_and_never_overshoots():
    """Exact beyond t_max too, up to the floor: a tenth of 1 - t_max."""
    alignment = Alignment(SCHEDULES["scaled_linear"], "x0")
    floor = (1 - alignment.t_range[1]) / 10

    def landing(t):
        time = torch.tensor(t, dtype=torch.float64)
        return alignment.velocity(torch.ones(1, 1).double(), torch.zeros(1, 1).double(), time).item() * (1 - t)

    for t in (0.5, 0.97, 0.98, 0.99, 1 - 1.001 * floor):
        assert landing(t) == pytest.approx(1)
    assert landing(1 - 0.999 * floor) == pytest.approx(0.999)
    assert landing(1 - floor / 4) == pytest.approx(0.25) and landing(1.0) == 0


def test_zero_terminal_snr_velocity_at_the_terminal():
    """At t = 0 the state is pure noise and v_pred = -x_data_hat: velocity = x_data_hat - x_noise."""
    alignment = Alignment(SCHEDULES["zero_terminal_snr"], "v")
    assert alignment.t_range[0] == 0
    x_noise, x_data_hat = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    found = alignment.velocity(-x_data_hat, x_noise, torch.tensor(0.0))
    torch.testing.assert_close(found, x_data_hat - x_noise)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_any_sample_gives_back_its_own_data_and_noise(name, prediction):
    """Not only in expectation: from the true prediction of one sample follows its velocity x_data - x_noise."""
    schedule = SCHEDULES[name]
    alignment = Alignment(schedule, prediction)
    low, high = max(alignment.t_range[0], 0.01), alignment.t_range[1]
    t = torch.linspace(low, high, 300, dtype=torch.float64)
    x_data, x_noise = torch.randn(2, 300, 2, 3, 4, 5, dtype=torch.float64)
    time = over(t, x_data)
    alpha, sigma = exact_coefficients(time, schedule.kind)
    output = {"eps": x_noise, "v": alpha * x_noise - sigma * x_data, "x0": x_data}[prediction]
    velocity = alignment.velocity(output, time * x_data + (1 - time) * x_noise, t)
    torch.testing.assert_close(velocity, x_data - x_noise, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_guidance_commutes(name, prediction):
    alignment = Alignment(SCHEDULES[name], prediction)
    t = torch.linspace(0, 1, 64, dtype=torch.float64).clamp(0.02, None)
    cond, uncond, x_flow = torch.randn(3, 64, 4, 3, 3, dtype=torch.float64)
    guided = alignment.velocity(uncond + 7.5 * (cond - uncond), x_flow, t)
    v_cond, v_uncond = alignment.velocity(cond, x_flow, t), alignment.velocity(uncond, x_flow, t)
    torch.testing.assert_close(guided, v_uncond + 7.5 * (v_cond - v_uncond), rtol=1e-10, atol=1e-10)


def published_velocity(x_flow, t):
    """The published code's rule: a table of 1001 times, whose index k means alphas_cumprod[k-1], gives the k that both
    the network and the 1000-entry tables of the prediction are asked for. v prediction, mean 0."""
    acp = SCHEDULES["scaled_linear"].alphas_cumprod
    acp_full = torch.cat([torch.ones(1, dtype=torch.float64), acp])
    alpha_full, sigma_full = acp_full.sqrt(), (1 - acp_full).sqrt()
    times = (alpha_full / (alpha_full + sigma_full)).flip(0)
    right = torch.searchsorted(times, t, right=True)
    k = 1000 - (right - 1 + (t - times[right - 1]) / (times[right] - times[right - 1]))

    def at(table, k):
        left = k.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[left], table[left + 1], (k - left).clamp(0, 1))

    x_diff = x_flow * at(alpha_full + sigma_full, k)
    alpha, sigma = at(acp.sqrt(), k), at((1 - acp).sqrt(), k)
    t_network = alpha / (alpha + sigma)
    v_pred = network(x_diff, t_network, "v", "vp", mean=0.0)
    x_data, eps = alpha * x_diff - sigma * v_pred, alpha * v_pred + sigma * x_diff
    return x_data - eps


@pytest.mark.parametrize(("t", "published"), [(0.7, 0.009), (0.9, 0.03), (0.97, 0.06)])
def test_the_oracle_sees_the_published_off_by_one(t, published):
    time = torch.tensor(t, dtype=torch.float64)
    x_flow = torch.randn(1, 64, dtype=torch.float64)
    exact = exact_velocity(x_flow, time, mean=0.0)
    alignment = Alignment(SCHEDULES["scaled_linear"], "v")
    ours = alignment.velocity(network(alignment.to_diffusion(x_flow, time), time, "v", "vp", mean=0.0), x_flow, time)
    assert relative_error(ours, exact).item() <= 1e-12
    assert relative_error(published_velocity(x_flow, time), exact).item() == pytest.approx(published, rel=0.35)
