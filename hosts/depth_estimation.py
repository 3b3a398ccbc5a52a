"""Depth of images by a model that looks at them: noise becomes the latent of a depth picture along the flow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checks import is_depth
from .choice import NOISES, flow_of
from .port import Host, HostError, ModelFacts

if TYPE_CHECKING:
    from torch import Tensor

    from ..depth.ensemble import Ensemble
    from ..samplers.parameterization import FlowParameterization

_MULTIPLE = 8
USUAL_RESOLUTION = 768
"""Longer side that is estimated at where a LoRA does not say what it was trained at."""


@dataclass(frozen=True)
class DepthPlan:
    """How depth is estimated.

    Args:
        steps, solver: along the flow, `samplers`.
        seed: of the noise.
        ensemble: estimates from different noise that are merged, at least 1.
        reduction: see `depth.ensemble.merged`.
        resolution: longer side that is estimated at, pixels; 0: what the LoRA was trained at.
        noise: "fixed": the same for all frames, which keeps a video still; "fresh": another for each.
        batch_size: frames in a network call.
        start: see `choice.choose_flow`.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 10
    solver: str = "euler"
    seed: int = 0
    ensemble: int = 1
    reduction: str = "median"
    resolution: int = 0
    noise: str = "fixed"
    batch_size: int = 4
    start: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "ensemble", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, not {self.noise!r}")
        if self.resolution and self.resolution < 2 * _MULTIPLE:
            raise ValueError(
                f"resolution must be at least {2 * _MULTIPLE} pixels, not {self.resolution}; 768 is usual, 0 takes what"
                " the LoRA was trained at"
            )


def estimate(host: Host, model: Any, clip: Any, vae: Any, images: Tensor, plan: DepthPlan) -> Ensemble:
    """Depth (B, H, W) of images (B, H, W, 3), near 0 and far 1: log depth up to scale and shift; and its uncertainty.

    Raises:
        HostError: the model does not look at images, or what is given is no IMAGE.
    """
    return estimate_along(host, model, flow_of(_depth_facts(host, model), plan.start), clip, vae, images, plan)


def estimate_along(
    host: Host, model: Any, flow: FlowParameterization, clip: Any, vae: Any, images: Tensor, plan: DepthPlan
) -> Ensemble:
    """The same along a given flow."""
    import torch

    from ..depth.ensemble import merged

    _require_images(images)
    size = _size(tuple(images.shape[1:3]), plan.resolution or _trained_at(host.facts(model)))
    small = _resized(images, size)
    clone, sigmas = host.along(model, flow, flow.times(plan.steps))
    members = [
        torch.cat(list(_member(host, clone, sigmas, clip, vae, small, plan, number))) for number in range(plan.ensemble)
    ]
    found = merged(torch.stack(members), plan.reduction)
    back = (_resized(part[..., None], tuple(images.shape[1:3]))[..., 0] for part in found)
    return type(found)(*back)


def _member(
    host: Host,
    model: Any,
    sigmas: Tensor,
    clip: Any,
    vae: Any,
    images: Tensor,
    plan: DepthPlan,
    number: int,
) -> Iterator[Tensor]:
    """One estimate of every frame (B, h, w), a batch of frames at a time."""
    import torch

    solver = host.solver(plan.solver, 1e-3, 1e-4)
    context, options = host.encode_text(clip, "")[0]
    for first in range(0, len(images), plan.batch_size):
        frames = images[first : first + plan.batch_size]
        image = host.encode_image(vae, frames)
        noises = [_noise_number(plan, number, first + i) for i in range(len(frames))]
        latent = {"samples": torch.zeros_like(image), "batch_index": noises}
        null_text = [[context, {**options, "concat_latent_image": image}]]
        sampled = host.sample(model, null_text, null_text, latent, plan.seed, solver, sigmas, 1.0)
        yield host.decode_image(vae, sampled["samples"]).float().mean(dim=-1).cpu()


def _noise_number(plan: DepthPlan, member: int, frame: int) -> int:
    """Which of the seed's noises it is: one for each member, or another for each frame as well."""
    return member if plan.noise == "fixed" else frame * plan.ensemble + member


def _depth_facts(host: Host, model: Any) -> ModelFacts:
    facts = host.facts(model)
    if not facts.sees_image:
        raise HostError(
            "model: it does not look at images, so it cannot tell their depth; load a depth LoRA onto it with Diff2Flow"
            " LoRA Loader (Diff2Flow Train makes one of Diff2Flow Depth Dataset)"
        )
    return facts


def _require_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise HostError(
            f"image: an IMAGE (frames, height, width, 3) is needed, not {tuple(images.shape)}; connect Load Image or a"
            " video's frames"
        )
    if not images.isfinite().all():
        raise HostError("image: it holds values that are NaN or infinite; look at the node that made it")


def _trained_at(facts: ModelFacts) -> int:
    """Longer side that the depth LoRA was trained at."""
    sizes = [lora.get("modelspec.resolution", "") for lora in facts.loras[::-1] if is_depth(lora)]
    sides = [int(side) for side in (sizes[0] if sizes else "").split("x") if side.isdigit()]
    return max(sides, default=USUAL_RESOLUTION)


def _size(size: Sequence[int], longer: int) -> tuple[int, int]:
    """(height, width) with that longer side, the shape kept, in multiples of 8."""
    scale = longer / max(size)
    height, width = (max(_MULTIPLE, round(side * scale / _MULTIPLE) * _MULTIPLE) for side in size)
    return height, width


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w, C) of (B, H, W, C), smoothly and without aliasing."""
    from torch.nn import functional

    if tuple(images.shape[1:3]) == size:
        return images
    channels_first = images.movedim(-1, 1).float()
    return functional.interpolate(channels_first, size=size, mode="bilinear", antialias=True).movedim(1, -1)
