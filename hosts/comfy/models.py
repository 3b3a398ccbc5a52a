"""What a ComfyUI MODEL is: its family, prediction type, schedule, and what Diff2Flow has done to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...alignment import NoiseSchedule
from ...alignment.precision import exact
from ...training.lora_layers import FullChange
from ..port import HostError, ModelFacts

LORAS = "diff2flow.loras"
"""Attachment of a ModelPatcher: metadata of the Diff2Flow LoRAs applied."""

_STOCK_LORA = "lora_metadata"
"""Attachment under which newer versions' own LoraLoader leaves a LoRA's metadata."""

_PREDICTIONS = (
    (comfy.model_sampling.V_PREDICTION, "v"),
    (comfy.model_sampling.X0, "x0"),
    (comfy.model_sampling.EPS, "eps"),
)
"""In this order: ComfyUI derives the first two from EPS."""

_FIRST = "diffusion_model.input_blocks.0.0.weight"
_RESHAPE = 5
"""Where ComfyUI's LoRA adapters hold the shape that they widen a weight to."""

_FAMILY_BY_CONTEXT = {768: "SD1", 1024: "SD2", 2048: "SDXL"}


def facts(model: Any) -> ModelFacts:
    """Facts of a ModelPatcher.

    Raises:
        HostError: the model is none of SD1.x, SD2.x and SDXL.
    """
    sampling = model.get_model_object("model_sampling")
    flow = getattr(sampling, "diff2flow", None)
    family_name = family(model)
    return ModelFacts(
        family=family_name,
        prediction=flow.alignment.prediction if flow else _prediction(sampling),
        schedule=flow.alignment.schedule if flow else _schedule(sampling),
        in_channels=in_channels(model),
        flow=flow,
        loras=_loras(model),
        sees_image=sees_image(model),
    )


def sees_image(model: Any) -> bool:
    """Whether the first convolution is wider than the checkpoint's, by a LoRA or in training."""
    return in_channels(model) > model.model.model_config.unet_config["in_channels"]


def in_channels(model: Any) -> int:
    """Of the first convolution, with what this MODEL's LoRAs and training add to it.

    Its weight does not tell: it may have another clone's LoRA on it just now.
    """
    widths = [model.model.model_config.unet_config["in_channels"]]
    first = model.model.diffusion_model.input_blocks[0][0]
    if isinstance(first, FullChange):
        widths.append(first.weight.shape[1])
    for patch in model.patches.get(_FIRST, ()):
        parts = getattr(patch[1], "weights", None) or ()
        widths += [shape[1] for shape in parts[_RESHAPE:] if isinstance(shape, list)]
    return max(widths)


def family(model: Any) -> str:
    """ "SD1", "SD2" or "SDXL"; HostError naming the model's class otherwise."""
    base = model.model
    config = getattr(base.model_config, "unet_config", {})
    network = base.diffusion_model
    known = _FAMILY_BY_CONTEXT.get(config.get("context_dim"))
    sampling = model.get_model_object("model_sampling")
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or hasattr(sampling, "diff2flow")
    if type(network) is UNetModel and known and discrete:
        return known
    raise HostError(
        f"the model is a {type(base).__name__} ({type(base.model_config).__name__}), which Diff2Flow cannot convert:"
        " it takes Stable Diffusion 1.x, 2.x and SDXL checkpoints"
        + (" (this one is a flow model already; sample it with ComfyUI's own nodes)" if _is_flow(sampling) else "")
    )


def _is_flow(sampling: Any) -> bool:
    return isinstance(sampling, comfy.model_sampling.CONST)


def _prediction(sampling: Any) -> str:
    for kind, name in _PREDICTIONS:
        if isinstance(sampling, kind):
            return name
    raise HostError(
        f"the model's prediction type ({type(sampling).__name__}) is none of eps, v and x0; remove the ModelSampling"
        " node in front of it"
    )


def _schedule(sampling: Any) -> NoiseSchedule:
    """The schedule behind a stock model_sampling, exact where it is Stable Diffusion's own.

    ComfyUI keeps sigma_k = sigma/alpha in float32; alphas_cumprod = 1/(1 + sigma_k²).
    """
    sigmas = exact(sampling.sigmas.detach().cpu())
    standard = NoiseSchedule.scaled_linear()
    kept = 1.0 / (1.0 + sigmas**2)
    if len(kept) == standard.steps and torch.allclose(kept, standard.alphas_cumprod, rtol=1e-5, atol=0.0):
        return standard
    return NoiseSchedule.from_alphas_cumprod(kept)


def _loras(model: Any) -> tuple[Mapping[str, str], ...]:
    own = tuple(model.attachments.get(LORAS, ()))
    stock = model.attachments.get(_STOCK_LORA)
    if isinstance(stock, Mapping) and "diff2flow.version" in stock and stock not in own:
        return (*own, stock)
    return own
