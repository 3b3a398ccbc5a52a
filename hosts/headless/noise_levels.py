"""What sigma means to a model: sigma_k for stock eps and v models, sigma_flow for models on a flow."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ...alignment import NoiseSchedule
from ...samplers.parameterization import LEAST_ALPHAS_CUMPROD, FlowParameterization
from .model import Model

_TABLE = 1000


class NoiseLevels(Protocol):
    """How a sampler's sigma, shape () or (B,), relates to a network's input, timestep and output.

    Attributes:
        flow: whether sigma is sigma_flow.
        sigmas: ascending table (T,) float32, for schedulers.
    """

    flow: bool
    sigmas: Tensor

    def timestep(self, sigma: Tensor) -> Tensor:
        """Network timestep tau."""

    def sigma(self, tau: Tensor) -> Tensor:
        """sigma of a fractional timestep."""

    def network_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        """x_diff of the sampler's state x (B, *dims)."""

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """x_data_hat from the network's output."""

    def noisy(self, sigma: Tensor, x_noise: Tensor, x_data: Tensor, at_start: bool = False) -> Tensor:
        """The sampler's state at sigma."""

    def finished(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The image in a state that sampling stopped at."""


def levels_of(model: Model) -> NoiseLevels:
    """The noise levels that a model is sampled in."""
    if model.flow is not None:
        return FlowLevels(model.flow)
    return StockLevels(model.base.schedule, model.base.prediction)


def is_start(levels: NoiseLevels, sigma: Tensor) -> bool:
    """Whether sampling from sigma starts at pure noise."""
    first, largest = float(sigma), float(levels.sigmas[-1])
    return first > largest or math.isclose(first, largest, rel_tol=1e-5)


class StockLevels:
    """sigma_k = sigma/alpha, and the nearest integer timestep: ComfyUI's ModelSamplingDiscrete for eps and v."""

    flow = False

    def __init__(self, schedule: NoiseSchedule, prediction: str) -> None:
        kept = schedule.alphas_cumprod.clamp(min=LEAST_ALPHAS_CUMPROD)
        sigmas = ((1.0 - kept) / kept).sqrt()
        self.sigmas, self._logs, self._prediction = sigmas.float(), sigmas.log().float(), prediction
        self._on_device = self._logs

    def timestep(self, sigma: Tensor) -> Tensor:
        if self._on_device.device != sigma.device:  # once: a copy would wait for the device each time
            self._on_device = self._logs.to(sigma.device)
        logs = self._on_device
        return (sigma.log().reshape(-1) - logs[:, None]).abs().argmin(dim=0).reshape(sigma.shape)

    def sigma(self, tau: Tensor) -> Tensor:
        place = tau.float().clamp(0, len(self._logs) - 1)
        low, high = self._logs[place.floor().long()], self._logs[place.ceil().long()]
        return ((1 - place.frac()) * low + place.frac() * high).exp()

    def network_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (_over(sigma, x) ** 2 + 1.0) ** 0.5

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        sigma = _over(sigma, x)
        if self._prediction == "eps":
            return x - output * sigma
        return x / (sigma**2 + 1.0) - output * sigma / (sigma**2 + 1.0) ** 0.5

    def noisy(self, sigma: Tensor, x_noise: Tensor, x_data: Tensor, at_start: bool = False) -> Tensor:
        sigma = _over(sigma, x_noise)
        return x_noise * (torch.sqrt(1.0 + sigma**2) if at_start else sigma) + x_data

    def finished(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x


class FlowLevels:
    """sigma_flow = 1 - t and fractional timesteps, with the table that the ComfyUI host gives its schedulers."""

    flow = True

    def __init__(self, flow: FlowParameterization) -> None:
        self._flow = flow
        self.sigmas = flow.sigmas(_TABLE)[:-1].flip(0)

    def timestep(self, sigma: Tensor) -> Tensor:
        return self._flow.timestep(sigma)

    def sigma(self, tau: Tensor) -> Tensor:
        return self._flow.sigma(tau).float()

    def network_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return self._flow.network_input(sigma, x)

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return self._flow.denoised(sigma, output, x)

    def noisy(self, sigma: Tensor, x_noise: Tensor, x_data: Tensor, at_start: bool = False) -> Tensor:
        return self._flow.noisy(sigma, x_noise, x_data, at_start)

    def finished(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (1.0 - sigma)


def _over(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x) if sigma.ndim else sigma.to(x)
