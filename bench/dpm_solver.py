"""DPM-Solver++ (2M) for the base model, by diffusers' scheduler: what the few-step numbers are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..alignment import NoiseSchedule
from ..hosts.port import Host


def dpm_solver(host: Host, steps: int) -> tuple[Any, Tensor]:
    """SAMPLER and SIGMAS (steps + 1,) of DPM-Solver++ (2M) on evenly spaced timesteps, the last steps of order 1.

    Args:
        host: makes the SAMPLER.
        steps: at least 1.
    """
    scheduler = _scheduler(steps)
    return host.sampler(_Walk(steps), {}), scheduler.sigmas.float()


class _Walk:
    """The scheduler as a k-diffusion style function."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def __call__(
        self,
        denoiser: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """x is in k-diffusion's scale, x_data + sigma_k x_noise; the scheduler's state is alpha times that."""
        scheduler = _scheduler(self._steps)
        for i, timestep in enumerate(scheduler.timesteps):
            sigma, later = scheduler.sigmas[i], scheduler.sigmas[i + 1]
            denoised = denoiser(x, sigma.to(x).expand(len(x)), **(extra_args or {}))
            if callback is not None:
                callback({"i": i, "x": x, "denoised": denoised, "sigma": sigma, "sigma_hat": sigma})
            state = scheduler.step(denoised, timestep, x / torch.sqrt(1 + sigma**2), return_dict=False)[0]
            x = state * torch.sqrt(1 + later**2)
        return x


def _scheduler(steps: int) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    alphas_cumprod = NoiseSchedule.scaled_linear().alphas_cumprod
    ratio = alphas_cumprod[1:] / alphas_cumprod[:-1]
    betas = 1.0 - torch.cat([alphas_cumprod[:1], ratio])
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=betas.tolist(), algorithm_type="dpmsolver++", prediction_type="sample", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    return scheduler
