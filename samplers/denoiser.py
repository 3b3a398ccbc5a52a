"""Our ODE solvers behind the calling convention of k-diffusion: sampler(denoiser, x, sigmas, ...)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .solvers import integrate

LAST_SIGMA = 1e-3
"""Solvers that look at the end point t = 1 ask the denoiser here instead: velocity = (x_data_hat - x) / sigma_flow has
no value at 0, and the network's timestep has been 0 since t_max < 1 - LAST_SIGMA for every schedule in use."""


def sample_flow(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    solver: str = "euler",
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> Tensor:
    """Solves dx/dt = velocity for a denoiser that speaks sigma_flow.

    velocity(x, t) = (x_data_hat - x) / (1 - t), with x_data_hat = denoiser(x, sigma_flow).

    Args:
        denoiser: called as denoiser(x, sigma (B,), **extra_args), returns x_data_hat.
        x: x_flow at sigmas[0], (B, *dims).
        sigmas: decreasing sigma_flow (steps + 1,).
        callback: called after each step with a dict: i, x, denoised, sigma, sigma_hat (k-diffusion's keys).
        disable: for k-diffusion's signature; progress is the callback's affair.
        solver, rtol, atol: see `integrate`.
    """
    walk = _Walk(denoiser, extra_args or {}, x.shape[0])
    times = 1.0 - sigmas.double().cpu()
    return integrate(walk.velocity, x, times, solver, walk.reporter(sigmas, callback), rtol=rtol, atol=atol)


def sample_sigma_k(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    solver: str = "euler",
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> Tensor:
    """The same for a denoiser that speaks sigma_k = (1 - t)/t, as stock eps and v models do in ComfyUI.

    The path is walked in flow time: x_flow = t x_k, t = 1/(1 + sigma_k) (the VE maps of DESIGN §2).
    """

    def flow_denoiser(x_flow: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        t = (1.0 - sigma).reshape(-1, *[1] * (x_flow.ndim - 1))
        return denoiser(x_flow / t, sigma / (1.0 - sigma), **extra)

    t = 1.0 / (1.0 + sigmas.double())
    x_flow = sample_flow(
        flow_denoiser, (x * t[0]).to(x.dtype), 1.0 - t, extra_args, callback, disable, solver, rtol, atol
    )
    return (x_flow / t[-1]).to(x.dtype)


class _Walk:
    """Velocity calls on a denoiser, remembering the latest x_data_hat for previews."""

    def __init__(self, denoiser: Callable[..., Tensor], extra_args: dict[str, Any], batch: int) -> None:
        self._denoiser, self._extra_args, self._batch = denoiser, extra_args, batch
        self._denoised: Tensor | None = None

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = (1.0 - t).clamp(min=LAST_SIGMA).to(device=x.device, dtype=x.dtype)
        self._denoised = self._denoiser(x, sigma.expand(self._batch), **self._extra_args)
        return (self._denoised - x) / sigma

    def reporter(
        self, sigmas: Tensor, callback: Callable[[dict[str, Any]], None] | None
    ) -> Callable[[int, Tensor, Tensor, Tensor], None] | None:
        if callback is None:
            return None

        def report(step: int, t: Tensor, x: Tensor, velocity: Tensor) -> None:
            callback({"i": step, "x": x, "denoised": self._denoised, "sigma": sigmas[step], "sigma_hat": sigmas[step]})

        return report
