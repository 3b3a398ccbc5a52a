"""Our ODE solvers behind the calling convention of k-diffusion: sampler(denoiser, x, sigmas, ...)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..alignment.precision import exact, wide_dtype
from .solvers import Callback, integrate

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
        watch: called after each step as `integrate` calls its callback, in flow time.
    """

    solver: str
    rtol: float
    atol: float
    speaks_flow: Callable[[Denoiser], bool]
    watch: Callback | None = None

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
        t = flow_times(sigmas, flow)
        lowest = FIRST_SIGMA_BACKWARD if t[-1] < t[0] else 0.0
        walk = _Walk(denoiser, flow, extra_args or {}, x.shape[0], lowest)
        first, last = t[[0, -1]].to(wide_dtype(x.device)).to(x.device)
        x_flow = x if flow else (x * first).to(x.dtype)
        report = walk.reporter(sigmas, callback, self.watch)
        tolerances = {"rtol": self.rtol, "atol": self.atol}
        x_flow = integrate(walk.velocity, x_flow, t, self.solver, report, pole=1.0, **tolerances)
        return x_flow if flow else (x_flow / last).to(x.dtype)


def flow_times(sigmas: Tensor, flow: bool) -> Tensor:
    """t of sigma_flow, or of sigma_k where `flow` is False: (N,) float64 on the CPU."""
    levels = exact(sigmas.cpu())
    return 1.0 - levels if flow else 1.0 / (1.0 + levels)


class _Walk:
    """Velocity calls on a denoiser at sigma_flow >= lowest, remembering the latest x_data_hat for previews.

    A denoiser of sigma_k gets, at each time of the grid, the very sigma that the grid has there: what other nodes have
    put on a model compares it with theirs.
    """

    def __init__(self, denoiser: Denoiser, flow: bool, extra_args: dict[str, Any], batch: int, lowest: float) -> None:
        self._denoiser, self._flow, self._extra_args = denoiser, flow, extra_args
        self._batch, self._lowest = batch, lowest
        self._denoised: Tensor | None = None

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of x_flow (B, *dims) at flow time t ()."""
        t = t.clamp(max=1.0 - self._lowest)
        sigma_flow = 1.0 - t
        state, sigma = (x, sigma_flow) if self._flow else (x / t.to(x), sigma_flow / t)
        self._denoised = self._denoiser(state, sigma.to(x).expand(self._batch), **self._extra_args)
        return (self._denoised - x) / sigma_flow.to(x)

    def reporter(self, sigmas: Tensor, callback: Report | None, watch: Callback | None) -> Callback | None:
        """What `integrate` calls after each step: `callback` hears of the denoiser's own unit, `watch` of flow time."""
        if callback is None:
            return watch

        def report(step: int, t: float, x: Tensor, velocity: Tensor) -> None:
            state = x if self._flow else x / t
            sigma = {"sigma": sigmas[step], "sigma_hat": sigmas[step]}
            callback({"i": step, "x": state, "denoised": self._denoised, **sigma})
            if watch is not None:
                watch(step, t, x, velocity)

        return report
