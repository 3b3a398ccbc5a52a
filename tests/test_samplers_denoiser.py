"""Our solvers on a denoiser: how they end at sigma = 0, on a Gaussian whose flow is known and under masks and patches."""

import math

import pytest
import torch

from diff2flow_nodes.samplers import SOLVERS, time_grid
from diff2flow_nodes.samplers.denoiser import FlowSampler

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2}
MEAN, STD = 0.7, 0.6
NOISE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
START = 0.07
"""Flow time of the first state."""

every_solver = pytest.mark.parametrize("solver", SOLVERS)
both_units = pytest.mark.parametrize("flow", [True, False], ids=["sigma_flow", "sigma_k"])


def gaussian(x, sigma):
    """E[x_data | x_flow] for data of mean MEAN and standard deviation STD, x_flow = t x_data + sigma x_noise."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    t = 1 - sigma
    return MEAN + STD**2 * t / (STD**2 * t**2 + sigma**2) * (x - t * MEAN)


def gaussian_end():
    """Where the exact flow takes the state at START: x_flow(t) = t MEAN + sqrt(t² STD² + (1-t)²) z."""
    return MEAN + STD * NOISE


def first_state(dtype=torch.float64):
    return (START * MEAN + math.sqrt(START**2 * STD**2 + (1 - START) ** 2) * NOISE).to(dtype)


def walked(denoiser, solver, steps, flow=True, x=None, times=None, **tolerances):
    """End of the walk of a denoiser of sigma_flow; told in sigma_k where `flow` is False."""
    x = first_state() if x is None else x
    sigmas = 1 - (time_grid(steps, start=START) if times is None else times)
    options = {"rtol": 1e-4, "atol": 1e-4, **tolerances}
    if flow:
        return FlowSampler(solver, speaks_flow=lambda given: True, **options)(denoiser, x, sigmas)

    def in_sigma_k(x_k, sigma_k):
        t = 1 / (1 + sigma_k)
        return denoiser(x_k * t.reshape(-1, 1, 1, 1), 1 - t)

    sampler = FlowSampler(solver, speaks_flow=lambda given: False, **options)
    return sampler(in_sigma_k, x / (1 - sigmas[0]), sigmas / (1 - sigmas))


@pytest.mark.parametrize("solver", ORDERS)
def test_the_last_step_keeps_the_order(solver):
    def error(steps):
        return (walked(gaussian, solver, steps) - gaussian_end()).abs().max().item()

    observed = math.log2(error(64) / error(128))
    assert observed >= ORDERS[solver] - 0.25  # the midpoint method has order 3 on this flow


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_dopri5_keeps_its_tolerance(steps):
    found = walked(gaussian, "dopri5", steps)
    assert ((found - gaussian_end()).abs() / (1e-4 + 1e-4 * gaussian_end().abs())).max() <= 5


@every_solver
@both_units
@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_the_kept_area_comes_back(solver, flow, steps):
    """As hosts do it: x_data_hat is the image where the mask keeps it."""
    image = 5 * torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    kept = torch.zeros(2, 4, 6, 6, dtype=torch.bool)
    kept[..., 3:] = True

    def masked(x, sigma):
        return torch.where(kept, image, gaussian(x, sigma)).float()

    x = torch.where(kept, START * image + (1 - START) * NOISE, first_state()).float()
    found = walked(masked, solver, steps, flow, x)
    assert (found - image)[kept].abs().max() <= 1e-5
    assert (found - image)[~kept].abs().mean() > 0.5


@every_solver
@both_units
@pytest.mark.parametrize("steps", [2, 8, 25])
def test_what_a_patch_adds_is_added_once(solver, flow, steps):
    """A denoiser that says "0.3" whatever it is given, plus its patch's 0.5, ends at 0.8."""
    found = walked(lambda x, sigma: torch.full_like(x, 0.3 + 0.5), solver, steps, flow)
    torch.testing.assert_close(found, torch.full_like(found, 0.8), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", ORDERS)
@both_units
@pytest.mark.parametrize("first", [0, 1])
def test_a_denoiser_that_wavers_moves_the_end_by_a_few_times_as_much_at_most(solver, flow, first):
    """0.5 more at every other call: a walk that divides by almost 0 ends hundreds away."""
    calls = []

    def wavering(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma) + 0.5 * ((len(calls) + first) % 2)

    found = walked(wavering, solver, 8, flow)
    assert (found - gaussian_end()).abs().max() <= 5 * 0.5


@every_solver
@pytest.mark.parametrize("last", [1e-3, 1e-4, 1e-6])
def test_an_end_just_before_sigma_0_is_as_good(solver, last):
    """Also with a step after it that is as short."""
    image = 5 * torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    head = time_grid(4, start=START)[:-1]
    for tail in ([1 - last], [1 - last, 1.0]):
        times = torch.cat([head, torch.tensor(tail, dtype=torch.float64)])
        x = START * image + (1 - START) * NOISE
        found = walked(lambda x, sigma: image, solver, 0, x=x, times=times)
        expected = image + (1 - times[-1]) * (NOISE - image)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@every_solver
@both_units
def test_nothing_is_asked_for_at_sigma_0(solver, flow):
    seen = []
    walked(lambda x, sigma: seen.append(sigma.min().item()) or gaussian(x, sigma), solver, 4, flow)
    assert min(seen) > 1e-3


@every_solver
@both_units
@pytest.mark.parametrize("sigmas", [[], [0.5]])
def test_without_a_step_the_state_comes_back(solver, flow, sigmas):
    x = first_state()
    sampler = FlowSampler(solver, 1e-4, 1e-4, lambda given: flow)
    assert torch.equal(sampler(None, x, torch.tensor(sigmas)), x)


@every_solver
def test_the_way_back_from_the_data_ends_finite_and_near_where_it_began(solver):
    """From sigma 0, where the first velocity is asked for a little later."""
    times = time_grid(50, start=START).flip(0)
    found = walked(gaussian, solver, 0, x=gaussian_end(), times=times)
    assert (found - first_state()).abs().max() < 0.1


def test_a_denoiser_of_sigma_k_gets_the_very_sigmas_and_states_of_its_own_unit():
    times = time_grid(25, start=0.0640425)
    sigmas, asked, told = ((1 - times) / times).float(), [], []

    def denoiser(x_k, sigma):
        asked.append(sigma[0].item())
        return 0.3 * x_k / (1 + sigma.reshape(-1, 1, 1, 1))

    x_k = sigmas[0] * NOISE.float()
    FlowSampler("euler", 1e-4, 1e-4, lambda given: False)(denoiser, x_k, sigmas, callback=told.append)
    assert asked == sigmas[:-1].tolist()
    for sigma, each, after in zip(sigmas[:-1], told, sigmas[1:], strict=True):  # k-diffusion's Euler
        x_k = x_k + (x_k - 0.3 * x_k / (1 + sigma)) / sigma * (after - sigma)
        torch.testing.assert_close(each["x"], x_k, rtol=1e-4, atol=1e-5)
