"""A Gaussian whose perfect network and perfect flow are known in closed form, and the published rule on it.

Data N(mean, 0.5²), noise N(0, 1). The network sees x_diff = alpha x_data + sigma x_noise with exact coefficients and
returns the conditional expectation of what it predicts; the flow's velocity is E[x_data - x_noise | x_flow]. Nothing
here is taken from `alignment` but the schedules' own numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD = 0.5


def states(t: Tensor, mean: float, count: int = 256) -> Tensor:
    """x_flow (T, count), float64, distributed as the flow has it at each t (T,); seeded.

    Args:
        t: (T,) flow times.
        mean: of the data.
        count: at each time.
    """
    random = torch.Generator().manual_seed(0)
    x_data = mean + STD * torch.randn(len(t), count, generator=random, dtype=torch.float64)
    x_noise = torch.randn(len(t), count, generator=random, dtype=torch.float64)
    return t[:, None] * x_data + (1 - t[:, None]) * x_noise


def exact_velocity(x_flow: Tensor, t: Tensor, mean: float) -> Tensor:
    """mean + (t s² - (1-t)) / (t² s² + (1-t)²) (x_flow - t mean), float64 (T, N), s = 0.5."""
    x, t = x_flow.double(), t[:, None]
    return mean + (t * STD**2 - (1 - t)) / (t**2 * STD**2 + (1 - t) ** 2) * (x - t * mean)


def network(x_diff: Tensor, alpha: Tensor, sigma: Tensor, prediction: str, mean: float) -> Tensor:
    """What a perfect network predicts (T, N) at noise level alpha, sigma (T,), in x_diff's dtype.

    Args:
        x_diff: (T, N).
        alpha, sigma: (T,) of the step it was asked for.
        prediction: "eps", "v" or "x0".
        mean: of the data.
    """
    alpha, sigma = (c[:, None].to(x_diff.dtype) for c in (alpha, sigma))
    gain = (x_diff - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
    x_data, eps = mean + alpha * STD**2 * gain, sigma * gain
    return {"eps": eps, "v": alpha * eps - sigma * x_data, "x0": x_data}[prediction]


def exact_coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma (T,) of the VP process at flow time t (T,): t/n and (1-t)/n, n = sqrt(t² + (1-t)²)."""
    n = (t**2 + (1 - t) ** 2).sqrt()
    return t / n, (1 - t) / n


def published_velocity(x_flow: Tensor, t: Tensor, alphas_cumprod: Tensor, prediction: str, mean: float) -> Tensor:
    """The velocity (T, N) by the rule of the published code, from its description.

    Time is looked up in a table of 1001 entries, whose index k means alphas_cumprod[k-1] (k = 0: no noise). The k that
    comes out is taken for the step of the network and for the index of 1000-entry tables alike, although there it is
    one step noisier.

    Args:
        x_flow: (T, N).
        t: (T,).
        alphas_cumprod: (1000,) of the schedule.
        prediction: "eps", "v" or "x0".
        mean: of the data.
    """
    full = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod])
    alpha_full, sigma_full = full.sqrt(), (1 - full).sqrt()
    k = _index(t, alpha_full / (alpha_full + sigma_full))
    x_diff = x_flow * _at(alpha_full + sigma_full, k)[:, None]
    alpha, sigma = _at(alphas_cumprod.sqrt(), k), _at((1 - alphas_cumprod).sqrt(), k)
    output = network(x_diff, alpha, sigma, prediction, mean)
    a, s = alpha[:, None], sigma[:, None]
    if prediction == "eps":
        return (x_diff - s * output) / a - output
    if prediction == "x0":
        return output - (x_diff - a * output) / s
    return (a * x_diff - s * output) - (a * output + s * x_diff)


def _index(t: Tensor, times: Tensor) -> Tensor:
    """Fractional index (T,) of t in a decreasing table."""
    rising = times.flip(0)
    right = torch.searchsorted(rising, t, right=True).clamp(1, len(rising) - 1)
    left = right - 1
    return len(rising) - 1 - (left + (t - rising[left]) / (rising[right] - rising[left]))


def _at(table: Tensor, k: Tensor) -> Tensor:
    """A table at fractional indices (T,); beyond its end its last entry."""
    left = k.floor().long().clamp(0, len(table) - 2)
    return torch.lerp(table[left], table[left + 1], (k - left).clamp(0, 1))
