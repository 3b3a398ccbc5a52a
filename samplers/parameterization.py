"""A diffusion network seen as a flow model, in the convention of samplers that count noise: sigma_flow = 1 - t."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..alignment import Alignment, NaiveFlow
from .grids import time_grid

STARTS = ("noise", "terminal")
LEAST_ALPHAS_CUMPROD = 4.8973451890853435e-08
"""What ComfyUI writes for the last timestep of a zero-terminal-SNR schedule, where sigma_k would be infinite."""
_LEAST_TIME = math.sqrt(LEAST_ALPHAS_CUMPROD) / (math.sqrt(LEAST_ALPHAS_CUMPROD) + math.sqrt(1 - LEAST_ALPHAS_CUMPROD))
"""Its flow time."""


def sigma_flow_of(times: Tensor) -> Tensor:
    """1 - t of flow times (N,) float64 in [0, 1], float32."""
    return (1.0 - times).float()


def sigma_k_of(times: Tensor) -> Tensor:
    """(1 - t)/t of flow times (N,) float64 in (0, 1], float32: the sigma of a stock eps or v model."""
    return ((1.0 - times) / times).float()


@dataclass(frozen=True, eq=False)
class FlowParameterization:
    """How a sampler that knows only sigma_flow talks to a diffusion network.

    Args:
        alignment: the maps between diffusion and flow of this network, or `NaiveFlow`.
        start: "noise" starts at t = 0 with plain noise (a model finetuned over all of [0, 1]); "terminal" starts at
            t_min with noise * n(t_min), which is what the base model saw last in training (tau = T-1).
        shift: time shift of the default grid, > 0; 1 is none, more than 1 spends more steps near the noise.

    Raises:
        ValueError: unknown start, or shift not above 0.
    """

    alignment: Alignment | NaiveFlow
    start: str = "terminal"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, not {self.start!r}")
        if not self.shift > 0:
            raise ValueError(f"shift must be above 0, not {self.shift}")

    @property
    def t_start(self) -> float:
        """Flow time of pure noise: 0 or t_min."""
        return 0.0 if self.start == "noise" else self.alignment.t_range[0]

    @property
    def sigma_max(self) -> float:
        """sigma_flow of pure noise: 1 - t_start."""
        return 1.0 - self.t_start

    def times(self, steps: int, shape: str = "uniform", denoise: float = 1.0) -> Tensor:
        """Increasing flow times (steps + 1,) from the start to 1, float64.

        denoise in (0, 1]: the part of the path that is walked; below 1 the grid begins at
        t_start + (1 - denoise) (1 - t_start), between the noise and the given image.

        Raises:
            ValueError: steps below 1, an unknown shape, denoise outside (0, 1].
        """
        if not 0.0 < denoise <= 1.0:
            raise ValueError(f"denoise must be above 0 and at most 1, not {denoise}")
        begin = self.t_start + (1.0 - denoise) * (1.0 - self.t_start)
        return time_grid(steps, shape=shape, start=begin, end=1.0, shift=self.shift)

    def sigmas(self, steps: int, shape: str = "uniform", denoise: float = 1.0) -> Tensor:
        """Decreasing sigma_flow (steps + 1,) float32, ending with 0: 1 - times."""
        return sigma_flow_of(self.times(steps, shape, denoise))

    def sigmas_k(self, steps: int, shape: str = "uniform", denoise: float = 1.0) -> Tensor:
        """The same grid for a stock eps or v model: sigma_k = (1 - t)/t, (steps + 1,) float32, ending with 0.

        A stock model knows no time before t_min: with start "noise" the grid begins at t_min all the same. With zero
        terminal SNR t_min is 0, and the grid begins at the largest sigma_k that ComfyUI has then.
        """
        stock = replace(self, start="terminal")
        return sigma_k_of(stock.times(steps, shape, denoise).clamp(min=_LEAST_TIME))

    def timestep(self, sigma: Tensor) -> Tensor:
        """Network timestep tau (fractional, 0 to T-1) of sigma_flow in [0, 1]."""
        return self.alignment.timestep(1.0 - sigma)

    def sigma(self, tau: Tensor) -> Tensor:
        """sigma_flow of a network timestep; that of t_min (tau = T-1 and above) is where sampling starts, sigma_max."""
        t = self.alignment.flow_time(tau)
        return torch.where(t <= self.alignment.t_range[0], torch.full_like(t, self.sigma_max), 1.0 - t)

    def network_input(self, sigma: Tensor, x_flow: Tensor) -> Tensor:
        """x_diff = x_flow / n(t) (Eq. 13), what the network is fed. Shapes (B,) or () and (B, *dims)."""
        return self.alignment.to_diffusion(x_flow, 1.0 - sigma)

    def denoised(self, sigma: Tensor, output: Tensor, x_flow: Tensor) -> Tensor:
        """x_data_hat = x_flow + (1 - t) velocity, from the network's output at x_flow. Shapes (B, *dims)."""
        velocity = self.alignment.velocity(output, x_flow, 1.0 - sigma)
        return x_flow + _over(sigma, x_flow) * velocity

    def noisy(self, sigma: Tensor, x_noise: Tensor, x_data: Tensor, at_start: bool = False) -> Tensor:
        """x_flow = t x_data + (1 - t) x_noise; at the start of sampling n(t) x_noise + t x_data.

        A base model's last training step, tau = T-1, is fed noise of standard deviation 1: x_diff = x_noise, hence
        x_flow(t_min) = n(t_min) x_noise. At t = 0 both forms are x_noise.
        """
        sigma = _over(sigma, x_noise)
        scale = torch.sqrt(sigma**2 + (1.0 - sigma) ** 2) if at_start else sigma
        return scale * x_noise + (1.0 - sigma) * x_data


def _over(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma of shape () or (B,) made to broadcast over x (B, *dims)."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) if sigma.ndim else sigma.to(x.dtype)
