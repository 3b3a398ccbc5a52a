"""Our ODE solvers behind the calling convention of k-diffusion: sampler(denoiser, x, sigmas, ...)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..alignment.precision import exact, wide_dtype
from .solvers import integrate

FIRST_SIGMA_BACKWARD = 1e-3
"""A walk from data to noise that begins at t = 1 asks the denoiser here instead: velocity = (x_data_hat - x)/sigma_flow
has no value at 0. Walks towards the data never ask at t = 1 (`pole` of `integrate`)."""

Denoiser = Callable[..., Tensor]
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class FlowSampler:
    """A k-diffusion style sampler that solves dx/dt = velocity, velocity(x, t) = (x_data_hat - x) / (1 - t).

    Args:
        solver, rtol, atol: see `integrate`.
        speaks_flow: tells of a denoiser whether its sigma is sigma_flow = 1 - t. Else it is sigma_k = (1 - t)/t, as for
            stock eps and v models in ComfyUI; the path is walked in flow time all the same: x_flow = t x_k,
            t = 1/(1 + sigma_k) (the VE maps of DESIGN §2).
    """

    solver: str
    rtol: float
    atol: float
    speaks_flow: Callable[[Denoiser], bool]

    @property
    def __name__(self) -> str:
        """As a sampler function would have it."""
        return f"diff2flow_{self.solver}"

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Report | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """The state at sigmas[-1]; x itself where sigmas has fewer than two.

        Where sigmas ends at 0, the last velocity is asked for before it: no step divides by (almost) 0.

        Args:
            denoiser: called as denoiser(x, sigma (B,), **extra_args), returns x_data_hat.
            x: the state at sigmas[0], (B, *dims).
            sigmas: decreasing (steps + 1,), or increasing for the way back, in the denoiser's unit.
            callback: called after each step with k-diffusion's dict: i, x, denoised, sigma, sigma_hat.
            disable: for k-diffusion's signature; progress is the callback's affair.
        """
        if len(sigmas) < 2:
            return x
        flow = self.speaks_flow(denoiser)
        levels = exact(sigmas.cpu())
        t = 1.0 - levels if flow else 1.0 / (1.0 + levels)
        lowest = FIRST_SIGMA_BACKWARD if t[-1] < t[0] else 0.0
        walk = _Walk(denoiser if flow else _in_flow_time(denoiser), extra_args or {}, x.shape[0], lowest)
        first, last = t[[0, -1]].to(wide_dtype(x.device)).to(x.device)
        x_flow = x if flow else (x * first).to(x.dtype)
        report = walk.reporter(sigmas, callback)
        tolerances = {"rtol": self.rtol, "atol": self.atol}
        x_flow = integrate(walk.velocity, x_flow, t, self.solver, report, pole=1.0, **tolerances)
        return x_flow if flow else (x_flow / last).to(x.dtype)


def _in_flow_time(denoiser: Denoiser) -> Denoiser:
    """A denoiser of sigma_k called with sigma_flow and x_flow: x_k = x_flow/t, sigma_k = (1 - t)/t."""

    def denoised(x_flow: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        t = 1.0 - sigma
        return denoiser(x_flow / t.reshape(-1, *[1] * (x_flow.ndim - 1)), sigma / t, **extra)

    return denoised


class _Walk:
    """Velocity calls on a denoiser at sigma_flow >= lowest, remembering the latest x_data_hat for previews."""

    def __init__(self, denoiser: Denoiser, extra_args: dict[str, Any], batch: int, lowest: float) -> None:
        self._denoiser, self._extra_args, self._batch, self._lowest = denoiser, extra_args, batch, lowest
        self._denoised: Tensor | None = None

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = (1.0 - t).clamp(min=self._lowest).to(device=x.device, dtype=x.dtype)
        self._denoised = self._denoiser(x, sigma.expand(self._batch), **self._extra_args)
        return (self._denoised - x) / sigma

    def reporter(self, sigmas: Tensor, callback: Report | None) -> Callable[[int, float, Tensor, Tensor], None] | None:
        if callback is None:
            return None

        def report(step: int, t: float, x: Tensor, velocity: Tensor) -> None:
            callback({"i": step, "x": x, "denoised": self._denoised, "sigma": sigmas[step], "sigma_hat": sigmas[step]})

        return report
