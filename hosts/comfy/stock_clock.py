"""A stock model sampled along its flow in ComfyUI's own sigma_k, in which the patches of other nodes are made."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...alignment import Alignment
from ...alignment.precision import wide
from ...samplers.parameterization import FlowParameterization

_OUTPUTS = {
    "eps": comfy.model_sampling.EPS,
    "v": comfy.model_sampling.V_PREDICTION,
    "x0": comfy.model_sampling.X0,
}


class FractionalTimesteps(comfy.model_sampling.ModelSamplingDiscrete):
    """ComfyUI's `model_sampling` in sigma_k = (1 - t)/t, its timesteps those of the flow: not rounded to integers.

    ComfyUI rebuilds such objects as type(original)(model_config), so the alignment is bound to a subclass
    (`fractional_timesteps`).
    """

    alignment: Alignment

    def __init__(self, model_config: Any = None, zsnr: bool | None = None) -> None:
        super().__init__(model_config, zsnr)
        kept = self.alignment.schedule.alphas_cumprod
        self.set_sigmas(torch.sqrt((1.0 - kept) / kept))

    def timestep(self, sigma: Tensor) -> Tensor:
        t = 1.0 / (1.0 + wide(sigma.flatten()))
        return self.alignment.timestep(t).reshape(sigma.shape).float()


def fractional_timesteps(original: Any, alignment: Alignment) -> FractionalTimesteps:
    """A `model_sampling` of the network's prediction in place of the original, whose percentages it keeps."""
    bases = (FractionalTimesteps, _OUTPUTS[alignment.prediction])
    sampling = type("Diff2FlowTimesteps", bases, {"alignment": alignment})()
    sampling.percent_to_sigma = original.percent_to_sigma
    return sampling


def reaches(flow: FlowParameterization, times: Tensor) -> bool:
    """Whether sigma_k holds a walk over flow times (steps + 1,): it begins where the network was trained.

    At t = 0 sigma_k is infinite; a network trained on the plain flow has no sigma_k.
    """
    alignment = flow.alignment
    return isinstance(alignment, Alignment) and float(times[0]) >= alignment.t_range[0] > 0.0
