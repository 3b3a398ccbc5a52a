"""A Stable Diffusion model sampled as a flow inside ComfyUI's own sampling loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...samplers.denoiser import FlowSampler
from ...samplers.parameterization import FlowParameterization, sigma_flow_of, sigma_k_of
from ..checks import require_channels
from . import models
from .image_input import show_image
from .stock_clock import fractional_timesteps, reaches
from .timed_patches import timed_patches

log = logging.getLogger(__name__)
TABLE = 1000
"""Entries of the table of sigmas that schedulers choose from."""
_silent: ContextVar[bool] = ContextVar("silent", default=False)


class FlowModelSampling(comfy.model_sampling.CONST, torch.nn.Module):
    """ComfyUI's `model_sampling` for a diffusion network on a flow: sigma is sigma_flow = 1 - t.

    ComfyUI rebuilds such objects as type(original)(model_config), so the flow is bound to a subclass
    (`flow_model_sampling`).
    """

    diff2flow: FlowParameterization
    noise_scale = 1.0

    def __init__(self, model_config: Any = None) -> None:
        super().__init__()
        self.set_parameters(self.diff2flow.shift)

    def set_parameters(self, shift: float = 1.0, multiplier: float = 1000.0) -> None:
        """Sets the time shift; `multiplier` is kept for ComfyUI, the timestep does not depend on it."""
        self.shift, self.multiplier = shift, multiplier
        self.diff2flow = replace(self.diff2flow, shift=shift)
        self.register_buffer("sigmas", self.diff2flow.sigmas(TABLE)[:-1].flip(0))

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.diff2flow.timestep(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.diff2flow.sigma(torch.as_tensor(timestep)).float()

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        left = 1.0 - percent
        return self.diff2flow.sigma_max * self.shift * left / (1.0 + (self.shift - 1.0) * left)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return self.diff2flow.network_input(_batched(sigma), noise)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return self.diff2flow.denoised(_batched(sigma), model_output, model_input)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return self.diff2flow.noisy(_batched(sigma), self.noise_scale * noise, latent_image, at_start=max_denoise)


def _batched(sigma: Tensor) -> Tensor:
    """ComfyUI hands sigma over as (), (1,), (B,) or (B, 1, 1, 1); here it becomes () or (B,)."""
    return sigma.reshape(()) if sigma.numel() == 1 else sigma.flatten()


def flow_model_sampling(flow: FlowParameterization) -> FlowModelSampling:
    """A `model_sampling` whose class carries `flow`."""
    return type("Diff2FlowModelSampling", (FlowModelSampling,), {"diff2flow": flow})()


def as_flow(model: Any, flow: FlowParameterization) -> Any:
    """A clone of the ModelPatcher that is sampled in sigma_flow; the original stays as it is.

    Patches that were made in sigma_k are named in a warning: their limits cannot be told to them anew.
    """
    warn_of_timed_patches(model)
    return _sampled_by(model, flow_model_sampling(flow))


def warn_of_timed_patches(model: Any) -> None:
    """Names the patches in the log that were made in sigma_k and will be asked in sigma_flow."""
    sampled = model.get_model_object("model_sampling")
    patches = [] if speaks_sigma_flow(sampled) else timed_patches(model)
    if patches:
        log.warning(
            "Diff2Flow: %s on this model act in a part of the steps, and were told so in the sigma of the model in"
            " front (14.6 to 0); on a flow model sigma is 1 to 0, so they act in other steps, or in none. Put the node"
            " that adds them behind Diff2Flow Model, or sample with Diff2Flow Sampler, without Diff2Flow Model and"
            " with start terminal",
            ", ".join(patches),
        )


def along(model: Any, flow: FlowParameterization, times: Tensor) -> tuple[Any, Tensor]:
    """A clone that `solver` samples along the flow, and flow times (steps + 1,) as its SIGMAS.

    A stock model stays in sigma_k where that holds the walk: what other nodes have put on it acts as in KSampler.
    """
    original = model.get_model_object("model_sampling")
    if hasattr(original, "diff2flow") or not reaches(flow, times):
        return as_flow(model, flow), sigma_flow_of(times)
    return _sampled_by(model, fractional_timesteps(original, flow.alignment)), sigma_k_of(times)


def _sampled_by(model: Any, sampling: Any) -> Any:
    """A clone with that `model_sampling`."""
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    if models.sees_image(clone):
        show_image(clone)
    return clone


def sampler(function: Callable[..., Tensor], options: Mapping[str, Any]) -> Any:
    """SAMPLER around a k-diffusion style function."""
    return comfy.samplers.KSAMPLER(function, dict(options))


def solver(solver: str, rtol: float, atol: float) -> Any:
    """SAMPLER that solves the flow, whatever sigma means for the model that it is given."""
    return sampler(FlowSampler(solver, rtol, atol, speaks_flow), {})


def speaks_flow(denoiser: Any) -> bool:
    """Whether a denoiser counts in sigma_flow."""
    return speaks_sigma_flow(denoiser.inner_model.inner_model.model_sampling)


def speaks_sigma_flow(sampling: Any) -> bool:
    """Whether a `model_sampling` counts in sigma_flow."""
    return isinstance(sampling, comfy.model_sampling.CONST)


@torch.inference_mode()
def sample(
    model: Any,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    seed: int,
    sampler: Any,
    sigmas: Tensor,
    cfg: float,
) -> dict[str, Any]:
    """LATENT by ComfyUI's own `sample_custom`, with its previews, masks, interruption and memory management.

    Raises:
        HostError: the latent has another number of channels than the model, and is not empty.
    """
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    channels = model.get_model_object("latent_format").latent_channels
    require_channels(samples, channels, models.family(model))
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    out = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=None if _silent.get() else latent_preview.prepare_callback(model, sigmas.shape[-1] - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": out}


@contextmanager
def silent() -> Iterator[None]:
    """Sampling neither moves the running node's bar nor shows previews in it: the node is training."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)
