"""Schedulers: decreasing sigmas for a number of steps, as ComfyUI's KSampler makes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..port import HostError
from .noise_levels import NoiseLevels

_RHO = 7.0
_BETA = 0.6


def sigmas_for(levels: NoiseLevels, scheduler: str, steps: int, denoise: float = 1.0) -> Tensor:
    """Sigmas (steps + 1,) float32, ending with 0; empty where denoise is 0.

    ddim_uniform may have one step more, as its stride through the table is a whole number.

    Args:
        scheduler: one of SCHEDULERS.
        steps: at least 1.
        denoise: in [0, 1]; below 1 the last `steps` of int(steps / denoise) steps are taken.
    """
    if denoise <= 0.0:
        return torch.zeros(0)
    if denoise > 0.9999:
        return SCHEDULERS[scheduler](levels, steps)
    return SCHEDULERS[scheduler](levels, int(steps / denoise))[-(steps + 1) :]


def _normal(levels: NoiseLevels, steps: int) -> Tensor:
    """Evenly spaced timesteps from the first to the last."""
    first, last = _timestep_range(levels)
    ends_at_zero = math.isclose(float(levels.sigma(torch.tensor(last))), 0.0, abs_tol=1e-5)
    taus = torch.linspace(first, last, steps + 1 if ends_at_zero else steps)
    return _with_zero(levels.sigma(taus)) if not ends_at_zero else levels.sigma(taus).float()


def _sgm_uniform(levels: NoiseLevels, steps: int) -> Tensor:
    """The same without the last timestep."""
    first, last = _timestep_range(levels)
    return _with_zero(levels.sigma(torch.linspace(first, last, steps + 1)[:-1]))


def _simple(levels: NoiseLevels, steps: int) -> Tensor:
    """Evenly spaced entries of the table, from its end."""
    stride = len(levels.sigmas) / steps
    return _with_zero(levels.sigmas[[-(1 + int(i * stride)) for i in range(steps)]])


def _ddim_uniform(levels: NoiseLevels, steps: int) -> Tensor:
    """Every n-th entry of the table, from its second on."""
    first_is_zero = math.isclose(float(levels.sigmas[1]), 0.0, abs_tol=1e-5)
    stride = max(len(levels.sigmas) // (steps + first_is_zero), 1)
    taken = levels.sigmas[1::stride].flip(0)
    return taken if first_is_zero else _with_zero(taken)


def _karras(levels: NoiseLevels, steps: int) -> Tensor:
    """Even steps of sigma^(1/7) (Karras et al. 2022, Eq. 5)."""
    low, high = (float(s) ** (1 / _RHO) for s in (levels.sigmas[0], levels.sigmas[-1]))
    return _with_zero((high + torch.linspace(0, 1, steps) * (low - high)) ** _RHO)


def _exponential(levels: NoiseLevels, steps: int) -> Tensor:
    """Even steps of log sigma."""
    low, high = (math.log(float(s)) for s in (levels.sigmas[0], levels.sigmas[-1]))
    return _with_zero(torch.linspace(high, low, steps).exp())


def _beta(levels: NoiseLevels, steps: int) -> Tensor:
    """Table entries at quantiles of Beta(0.6, 0.6) (arXiv 2407.12173), repeated ones once."""
    try:
        from scipy.stats import beta
    except ImportError:
        raise HostError("the scheduler 'beta' needs scipy; install it, or choose 'normal' or 'simple'") from None
    quantiles = beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), _BETA, _BETA)
    places = np.rint(quantiles * (len(levels.sigmas) - 1)).astype(int)
    return _with_zero(levels.sigmas[list(dict.fromkeys(places.tolist()))])


def _timestep_range(levels: NoiseLevels) -> tuple[float, float]:
    return float(levels.timestep(levels.sigmas[-1])), float(levels.timestep(levels.sigmas[0]))


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.float(), torch.zeros(1)])


SCHEDULERS: Mapping[str, Callable[[NoiseLevels, int], Tensor]] = {
    "simple": _simple,
    "sgm_uniform": _sgm_uniform,
    "karras": _karras,
    "exponential": _exponential,
    "ddim_uniform": _ddim_uniform,
    "beta": _beta,
    "normal": _normal,
}
