"""Sampling: the SAMPLER socket, and LATENT from noise in ComfyUI's conventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...samplers.denoiser import FlowSampler
from ..checks import require_channels
from ..port import HostError
from .guidance import Denoiser, repeated
from .model import Model
from .noise_levels import is_start, levels_of
from .progress import TqdmProgress


@dataclass(frozen=True)
class Sampler:
    """The SAMPLER socket: a k-diffusion style function and its options."""

    function: Callable[..., Tensor]
    options: Mapping[str, Any]


def euler(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler steps in sigma: x += (x - x_data_hat)/sigma · (next sigma - sigma). Arguments as in `FlowSampler`."""
    for i in range(len(sigmas) - 1):
        sigma = sigmas[i]
        denoised = denoiser(x, sigma.expand(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"i": i, "x": x, "denoised": denoised, "sigma": sigma, "sigma_hat": sigma})
        x = x + (x - denoised) / sigma * (sigmas[i + 1] - sigma)
    return x


def solver(solver: str, rtol: float, atol: float) -> Sampler:
    """SAMPLER that solves the flow, whatever sigma means for the model that it is given."""
    return Sampler(FlowSampler(solver, rtol, atol, lambda denoiser: denoiser.levels.flow), {})


def seeded_noise(latent: Tensor, seed: int, numbers: Sequence[int] | None = None) -> Tensor:
    """Noise of the latents' shape, drawn on the CPU as ComfyUI draws it: in one go, or item by item where numbered.

    Args:
        latent: (B, *dims).
        seed: of the generator.
        numbers: of the items (B,), from 0 on; equal ones have the same noise.
    """
    generator = torch.manual_seed(seed)
    if numbers is None:
        return torch.randn(latent.shape, dtype=torch.float32, generator=generator, device="cpu")
    drawn = [torch.randn(latent.shape[1:], generator=generator, device="cpu") for _ in range(max(numbers) + 1)]
    return torch.stack([drawn[number] for number in numbers])


@torch.no_grad()
def sample(
    model: Model,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    noise: Tensor,
    sampler: Sampler,
    sigmas: Tensor,
    cfg: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """LATENT sampled around latent["samples"], and the last x_data_hat as a LATENT.

    Args:
        noise: x_noise, of the latents' shape.
        sigmas: decreasing (steps + 1,), in the model's own unit; empty leaves the latent as it is.

    Raises:
        HostError: the latent does not fit the model, or sampling ends in values that are not finite.
    """
    if len(sigmas) == 0:
        return dict(latent), dict(latent)
    device = model.base.device
    image = _fitting(model, latent["samples"]).to(device, torch.float32) * model.base.latent_scale
    noise, sigmas = noise.to(device), sigmas.to(device)
    mask = _mask(latent.get("noise_mask"), image)
    levels = levels_of(model)
    denoiser = Denoiser(model, levels, positive, negative, cfg, noise, image, mask)
    x = levels.noisy(sigmas[0], noise, image, at_start=is_start(levels, sigmas[0]))
    x, last = _walk(sampler, denoiser, x, sigmas)
    x = levels.finished(sigmas[-1], x)
    _require_finite(x, sigmas)
    last = x if last is None else last
    return _latent(model, latent, x), _latent(model, latent, last)


def _latent(model: Model, given: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """x in the autoencoder's scale, with what else the LATENT carried."""
    return {**given, "samples": (x / model.base.latent_scale).cpu()}


def _walk(sampler: Sampler, denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor | None]:
    """The end of the path, and the last x_data_hat; with a progress bar."""
    progress, seen = TqdmProgress(len(sigmas) - 1, "sampling"), {}

    def step(state: dict[str, Any]) -> None:
        seen["denoised"] = state["denoised"]
        progress.update(state["i"] + 1)

    try:
        end = sampler.function(denoiser, x, sigmas, extra_args={}, callback=step, disable=True, **sampler.options)
    finally:
        progress.close()
    return end, seen.get("denoised")


def _fitting(model: Model, samples: Tensor) -> Tensor:
    channels, family = model.base.layout.config["out_channels"], model.base.layout.family
    require_channels(samples, channels, family)
    if samples.ndim != 4:
        raise HostError(
            f"the latent has shape {tuple(samples.shape)}; {family} takes (B, {channels}, height/8, width/8)"
        )
    return samples


def _mask(mask: Tensor | None, image: Tensor) -> Tensor | None:
    """The latent's noise_mask, resized to (B, C, h, w)."""
    if mask is None:
        return None
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(image)
    mask = nn.functional.interpolate(mask, size=image.shape[-2:], mode="bilinear")
    return repeated(mask.expand(-1, image.shape[1], -1, -1), len(image))


def _require_finite(x: Tensor, sigmas: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise HostError(
            f"sampling in {len(sigmas) - 1} steps ended in values that are NaN or infinite; the model's weights or LoRA"
            " are damaged, or the prediction type is wrong"
        )
