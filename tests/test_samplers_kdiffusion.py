"""Euler on the flow of an eps network is k-diffusion's Euler at sigma_k = (1-t)/t (DDIM), written here anew."""

import math
from itertools import pairwise

import pytest
import torch

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.samplers import integrate, time_grid

SCHEDULE = NoiseSchedule.scaled_linear()


def network(x_diff, tau):
    """Any eps network: nonlinear in x, and it knows its timestep."""
    return torch.tanh(1.3 * x_diff) + 0.2 * torch.cos(tau.to(x_diff.dtype) / 150) * x_diff.flip(-1)


def kdiffusion_timestep(sigma):
    """log sigma looked up in the table linearly in flow time, in plain Python."""
    acp = SCHEDULE.alphas_cumprod.tolist()
    t_of = [1 / (1 + math.sqrt((1 - a) / a)) for a in acp]
    t = 1 / (1 + sigma)
    if t >= t_of[0]:
        return 0.0
    right = next((i for i, known in enumerate(t_of) if known <= t), len(t_of) - 1)
    return right - min(max((t - t_of[right]) / (t_of[right - 1] - t_of[right]), 0.0), 1.0)


def kdiffusion_euler(x_k, sigmas):
    """x_k = x_data + sigma·eps; the network is fed x_k/sqrt(1+sigma²)."""
    for sigma, sigma_next in pairwise(sigmas):
        eps = network(x_k / math.sqrt(1 + sigma**2), torch.tensor(kdiffusion_timestep(sigma), dtype=torch.float64))
        denoised = x_k - sigma * eps
        slope = (x_k - denoised) / sigma
        x_k = x_k + slope * (sigma_next - sigma)
    return x_k


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", ["uniform", "u_shaped"])
@pytest.mark.parametrize("dims", [(4, 8, 8), (4, 3, 4, 4)])
def test_euler_on_the_flow_is_kdiffusions_euler(dtype, bound, shape, dims):
    alignment = Alignment(SCHEDULE, "eps")
    times = time_grid(20, shape, start=alignment.t_range[0])

    def velocity(x_flow, t):
        eps = network(alignment.to_diffusion(x_flow, t), alignment.timestep(t))
        return alignment.velocity(eps, x_flow, t)

    x_noise = torch.randn(2, *dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    t_start = times[0].item()
    ours = integrate(velocity, alignment.to_flow(x_noise, torch.tensor(999)), times)
    x_k = x_noise * (math.sqrt(t_start**2 + (1 - t_start) ** 2) / t_start)
    theirs = kdiffusion_euler(x_k, [(1 - t) / t for t in times.tolist()])
    assert ((ours - theirs).norm() / theirs.norm()).item() <= bound
    assert (ours - x_noise).norm() > 0.1 * x_noise.norm()
