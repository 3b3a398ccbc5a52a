"""What a ComfyUI MODEL is: its family, prediction type, schedule, and what Diff2Flow has done to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...alignment import NoiseSchedule
from ...alignment.precision import exact
from ...samplers.parameterization import LEAST_ALPHAS_CUMPROD
from ...training.checkpoint_file import Marks
from ...training.lora_layers import FullChange
from ..choice import as_trained, say_once, tell_lost_prediction
from ..port import HostError, ModelFacts, Said
from . import recognition

_PREDICTIONS = (
    (comfy.model_sampling.V_PREDICTION, "v"),
    (comfy.model_sampling.X0, "x0"),
    (comfy.model_sampling.EPS, "eps"),
)
"""In this order: ComfyUI derives the first two from EPS."""

FIRST = "diffusion_model.input_blocks.0.0.weight"
"""The first convolution, which LoRAs for depth widen."""
_RESHAPE = 5
"""Where ComfyUI's LoRA adapters hold the shape that they widen a weight to."""

_FAMILY_BY_CONTEXT = {768: "SD1", 1024: "SD2", 2048: "SDXL"}

_BETAS = ("linear", "sqrt_linear", "cosine")
"""ComfyUI's names of the schedules of which a model sampling may keep every n-th timestep."""

_NODES = {
    "ModelSamplingContinuousV": "ModelSamplingContinuousV",
    "ModelSamplingCosmosRFlow": "ModelSamplingCosmosRFlow",
    "ModelSamplingContinuousEDM": "ModelSamplingContinuousEDM",
    "StableCascadeSampling": "ModelSamplingStableCascade",
    "ModelSamplingFlux": "ModelSamplingFlux",
    "ModelSamplingDiscreteFlow": "ModelSamplingSD3 or ModelSamplingAuraFlow",
    "ModelSamplingDiscreteDistilled": "ModelSamplingDiscrete",
    "ModelSamplingDiscrete": "ModelSamplingDiscrete",
}
"""Which node puts a model sampling of that class in place, derived classes first."""

_FLOW_ALREADY = " (this one is a flow model already; sample it with ComfyUI's own nodes)"
_TAKE_IT_OUT = "it was trained with: take that node out in front of Diff2Flow's nodes"


def facts(model: Any) -> ModelFacts:
    """Facts of a ModelPatcher.

    Raises:
        HostError: the model is none of SD1.x, SD2.x and SDXL.
    """
    sampling = model.get_model_object("model_sampling")
    flow = getattr(sampling, "diff2flow", None)
    if flow is None:
        return stock_facts(model, sampling, is_patched(model))
    return ModelFacts(
        family=_family(model),
        prediction=flow.alignment.prediction,
        schedule=flow.alignment.schedule,
        flow=flow,
        **_whatever_the_sampling(model),
    )


def stock_facts(model: Any, sampling: Any, by_node: bool) -> ModelFacts:
    """Facts of a ModelPatcher that is sampled by a stock `model_sampling`.

    Args:
        by_node: whether a node put that in place.

    Raises:
        HostError: as `facts`.
    """
    family_name = _family(model, sampling)
    _require_discrete(sampling, family_name, by_node)
    said = ModelFacts(
        family=family_name,
        prediction=_prediction(sampling),
        schedule=_schedule(sampling),
        **_whatever_the_sampling(model),
    )
    return as_trained(said if by_node else _as_marked(model, said), by_node)


def _whatever_the_sampling(model: Any) -> dict[str, Any]:
    """Facts that do not depend on how the model is sampled."""
    path = recognition.checkpoint_of(model)
    return {
        "in_channels": in_channels(model),
        "loras": _loras(model),
        "sees_image": sees_image(model),
        "base_name": recognition.checkpoint_name(path) if path else "",
    }


def _as_marked(model: Any, said: ModelFacts) -> ModelFacts:
    """The facts with the marks of the checkpoint's file, which ComfyUI reads of SDXL files only."""
    path = recognition.checkpoint_of(model)
    marked = recognition.marks_of(path) if path else Marks()
    if marked.lost_v and said.prediction == "eps":
        tell_lost_prediction(recognition.checkpoint_name(path))
    if said.prediction == "v" or not marked.v:
        return said
    say_once(
        f"ComfyUI takes '{recognition.checkpoint_name(path)}' for an eps model, though the file is marked as v"
        " prediction. Diff2Flow's nodes sample and train it as v; for ComfyUI's own samplers load it by Diff2Flow"
        " Checkpoint Loader, or put ModelSamplingDiscrete (v_prediction) behind its loader"
    )
    schedule = said.schedule.switched("on" if marked.zero_terminal_snr else "auto")
    return replace(said, prediction="v", schedule=schedule)


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
    for patch in model.patches.get(FIRST, ()):
        parts = getattr(patch[1], "weights", None) or ()
        widths += [shape[1] for shape in parts[_RESHAPE:] if isinstance(shape, list)]
    return max(widths)


def family(model: Any) -> str:
    """ "SD1", "SD2" or "SDXL"; HostError naming the model's class otherwise, or the node that replaced its noise."""
    sampling = model.get_model_object("model_sampling")
    name = _family(model, sampling)
    if getattr(sampling, "diff2flow", None) is None:
        _require_discrete(sampling, name, is_patched(model))
    return name


def _family(model: Any, sampling: Any = None) -> str:
    base = model.model
    config = getattr(base.model_config, "unet_config", {})
    network = base.diffusion_model
    known = _FAMILY_BY_CONTEXT.get(config.get("context_dim"))
    if type(network) is UNetModel and known:
        return known
    raise HostError(
        f"the model is a {type(base).__name__} ({type(base.model_config).__name__}), which Diff2Flow cannot convert:"
        " it takes Stable Diffusion 1.x, 2.x and SDXL checkpoints" + (_FLOW_ALREADY if _is_flow(sampling) else "")
    )


def _require_discrete(sampling: Any, family_name: str, by_node: bool) -> None:
    """HostError where a model of a known family is sampled by something else than a table of timesteps."""
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        return
    if by_node:
        raise HostError(f"{_in_front(sampling)} gives this {family_name} model other noise levels than {_TAKE_IT_OUT}")
    raise HostError(
        f"this {family_name} checkpoint is sampled by {_kind(sampling)}, not by the noise levels of Stable Diffusion;"
        " Diff2Flow cannot convert it" + (_FLOW_ALREADY if _is_flow(sampling) else "")
    )


def is_patched(model: Any) -> bool:
    """Whether a node has replaced the checkpoint's own model sampling."""
    return "model_sampling" in model.object_patches


def _kind(sampling: Any) -> str:
    """The first class of a model sampling that has a name of its own: nodes derive one anew."""
    names = [each.__name__ for each in type(sampling).__mro__]
    return next((name for name in names if name in _NODES), names[0])


def _in_front(sampling: Any) -> str:
    return f"the node {_NODES.get(_kind(sampling), 'for model sampling')} in front"


def _is_flow(sampling: Any) -> bool:
    return isinstance(sampling, comfy.model_sampling.CONST)


def _prediction(sampling: Any) -> str:
    for kind, name in _PREDICTIONS:
        if isinstance(sampling, kind) and not isinstance(sampling, comfy.model_sampling.IMG_TO_IMG):
            return name
    raise HostError(
        f"the model's prediction type ({type(sampling).__name__}) is none of eps, v and x0: take {_in_front(sampling)}"
        " out"
    )


def _schedule(sampling: Any) -> NoiseSchedule:
    """The schedule behind a stock model_sampling, exact where it is Stable Diffusion's own.

    ComfyUI keeps sigma_k = sigma/alpha in float32; alphas_cumprod = 1/(1 + sigma_k²). With zero terminal SNR the last
    of them is a stand-in for 0.
    """
    sigmas = exact(_sigma_per_timestep(sampling).detach().cpu())
    standard, kept = NoiseSchedule.scaled_linear(), 1.0 / (1.0 + sigmas**2)
    for known in (standard, standard.zero_terminal_snr()) if len(kept) == standard.steps else ():
        if torch.allclose(kept, known.alphas_cumprod, rtol=1e-5, atol=2 * LEAST_ALPHAS_CUMPROD):
            return known
    return NoiseSchedule.from_alphas_cumprod(kept)


def _sigma_per_timestep(sampling: Any) -> Tensor:
    """sigma_k (T,) of the timesteps 0..T-1 that the network knows.

    A distilled model sampling, as of `ModelSamplingDiscrete lcm` and AnimateDiff's lcm, keeps every 20th of 1000: entry
    i belongs to timestep 20 i + 19. Its other levels are found by making ComfyUI's schedules anew.

    Raises:
        HostError: the entries are no timesteps of a schedule that is known.
    """
    sigmas = sampling.sigmas.cpu()
    timesteps = exact(sampling.timestep(sampling.sigmas).cpu())
    if (timesteps - torch.arange(len(sigmas))).abs().max() < 0.5:
        return sigmas
    entries = timesteps.round().long()
    for betas in _BETAS if _is_part_of_table(sampling, timesteps) else ():
        every = _made_anew(sampling, betas)
        if torch.allclose(every[entries], sigmas, rtol=1e-4):
            return every
    raise HostError(f"{_in_front(sampling)} gives this model other noise levels than {_TAKE_IT_OUT}")


def _is_part_of_table(sampling: Any, timesteps: Tensor) -> bool:
    """Whether all timesteps are whole numbers of a table whose ends are known."""
    whole = torch.equal(timesteps, timesteps.round()) and timesteps.min() >= 0
    return whole and hasattr(sampling, "linear_start") and bool(timesteps.max() < sampling.num_timesteps)


def _made_anew(sampling: Any, betas: str) -> Tensor:
    """sigma_k (T,) of one of ComfyUI's schedules between the ends of a model sampling."""
    whole = comfy.model_sampling.ModelSamplingDiscrete()
    ends = {"linear_start": sampling.linear_start, "linear_end": sampling.linear_end}
    whole._register_schedule(beta_schedule=betas, timesteps=sampling.num_timesteps, zsnr=sampling.zsnr, **ends)
    return whole.sigmas


def _loras(model: Any) -> tuple[Said, ...]:
    """Metadata of the checkpoint, if Diff2Flow made it, and of the LoRAs on the model that say what they are."""
    found = recognition.loras_on(model)
    if recognition.was_noted(model):
        return found
    path = recognition.checkpoint_of(model)
    checkpoint = recognition.metadata_of(path) if path else {}
    return (checkpoint, *found) if checkpoint else found
