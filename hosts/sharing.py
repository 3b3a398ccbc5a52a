"""What a model must be before it is written for programs that do not know Diff2Flow."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .checks import is_depth
from .port import HostError, ModelFacts

_LATENT_CHANNELS = 4


def require_stock(facts: ModelFacts) -> None:
    """Raises where the weights alone cannot work elsewhere.

    A widened first convolution would be loaded, but as another kind of model: ComfyUI takes 8 input channels for
    InstructPix2Pix.

    Raises:
        HostError: trained by plain flow matching, or for depth; says what to do instead.
    """
    for lora in facts.loras:
        name = lora.get("modelspec.title", "")
        if lora.get("diff2flow.objective") == "flow_matching":
            raise HostError(
                f"model: '{name}' was trained by plain flow matching, without alignment: its network is no eps or v"
                " network any more, and only Diff2Flow nodes can sample it; share the LoRA file itself, or train with"
                " objective 'diff2flow'"
            )
        if is_depth(lora):
            raise HostError(_depth(name))
    if facts.sees_image:
        raise HostError(_depth(""))


def _depth(name: str) -> str:
    return (
        f"model: the LoRA '{name}' makes the network look at an image and predict depth; other programs would take it"
        " for an image editing model (InstructPix2Pix), so share the LoRA file itself, for Diff2Flow Depth"
    )


def require_text_to_image_network(facts: ModelFacts) -> None:
    """HostError where the network takes more than latents (inpainting)."""
    if facts.in_channels != _LATENT_CHANNELS:
        raise HostError(
            f"model: its network takes {facts.in_channels} channels (inpainting), and only text-to-image models of"
            f" {_LATENT_CHANNELS} can be exported to diffusers; save it by Diff2Flow Save Checkpoint"
        )


def trains_text(lora: Mapping[str, str]) -> bool:
    """Whether a LoRA's metadata says that it changes the text encoder as well."""
    try:
        return bool(json.loads(lora.get("diff2flow.lora", "{}")).get("text_encoder", False))
    except (ValueError, AttributeError):
        return False
