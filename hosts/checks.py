"""What both hosts' nodes check before heavy work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .port import HostError, ModelFacts


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
