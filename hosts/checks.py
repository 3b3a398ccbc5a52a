"""What both hosts' nodes check before heavy work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .port import HostError, ModelFacts

_PARTS = {"MODEL": "diffusion model", "CLIP": "text encoder", "VAE": "VAE"}


def require_finite_latent(latent: Mapping[str, Any], name: str = "latent_image") -> None:
    """Raises HostError if a LATENT holds NaN or infinity, with their number and the batch items they are in."""
    samples = latent["samples"]
    if torch.isfinite(samples).all():
        return
    bad = ~torch.isfinite(samples).flatten(1)
    items = torch.nonzero(bad.any(dim=1)).flatten().tolist()
    raise HostError(
        f"{name} holds {int(bad.sum())} values that are NaN or infinite (batch items {items}); encode the image again,"
        " or look at the node that made this latent (an fp16 VAE that overflows is the usual cause)"
    )


def require_channels(samples: Tensor, channels: int, family: str) -> None:
    """Raises HostError if a latent (B, C, ...) has another number of channels than the model takes."""
    if samples.shape[1] != channels:
        raise HostError(
            f"latent_image: it has {samples.shape[1]} channels (shape {tuple(samples.shape)}), the {family} model takes"
            f" {channels}: it was made for another kind of model (SD3 and Flux have 16); encode the image with the VAE"
            " of this checkpoint, or use Empty Latent Image"
        )


def require_given(inputs: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raises HostError where a MODEL, CLIP or VAE that a node needs is connected, but its checkpoint has none.

    Args:
        inputs: of a node, by name.
        kinds: what the node declares for its required inputs, ("VAE", ...) by name.
    """
    for name, kind in kinds.items():
        what = _PARTS.get(kind[0]) if isinstance(kind[0], str) else None
        if what and name in inputs and is_absent(inputs[name]):
            raise HostError(
                f"{name}: the checkpoint that it comes from holds no {what}; connect the {kind[0]} of a full checkpoint,"
                " or load one from a file of its own by a node such as Load VAE or Load CLIP"
            )


def is_absent(part: Any) -> bool:
    """Whether an input is None, or ComfyUI's VAE of a checkpoint without one, which has no network."""
    return part is None or getattr(part, "first_stage_model", part) is None


def require_text_to_image(facts: ModelFacts, positive: Any) -> None:
    """Raises HostError where a model looks at an image and the conditioning brings none."""
    if facts.sees_image and not all("concat_latent_image" in options for _, options in positive):
        name = next((lora.get("modelspec.title", "") for lora in facts.loras[::-1] if is_depth(lora)), "")
        raise HostError(
            f"model: the LoRA {name!r} makes it look at an image and predict depth, and there is none in positive;"
            " sample it with Diff2Flow Depth, or remove the LoRA to make images of text"
        )


def is_depth(metadata: Mapping[str, str]) -> bool:
    """Whether a LoRA's metadata says that it was trained for depth."""
    return metadata.get("diff2flow.task") == "depth"
