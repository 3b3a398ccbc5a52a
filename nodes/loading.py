"""Nodes that load checkpoints and Diff2Flow LoRAs."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from .effects import tells_the_page
from .errors import names_node
from .widgets import choice, number

CATEGORY = "Diff2Flow/loaders"
NO_LORA = "None"

_STRENGTH = number(
    1.0,
    10.0,
    0.05,
    "How much of the LoRA is added, without unit. 1 is what was trained, 0 changes nothing.",
    minimum=-10.0,
    rounding=None,
)


@tells_the_page
class Diff2FlowCheckpointLoader:
    """Loads a Stable Diffusion checkpoint, and a LoRA on it if one is chosen."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The diffusion model. Diff2Flow Sampler takes it as it is; Diff2Flow Model prepares it for any KSampler.",
        "The text encoder.",
        "The autoencoder between pixels and latents.",
    )
    SEARCH_ALIASES = ("load checkpoint", "load model", "model loader", "rectified flow", "flow matching")
    DESCRIPTION = "Loads a Stable Diffusion 1.x, 2.x or SDXL checkpoint together with a Diff2Flow LoRA."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        host = current()
        return {
            "required": {
                "ckpt_name": (
                    host.names("checkpoints"),
                    {"tooltip": "A Stable Diffusion 1.x, 2.x or SDXL checkpoint from the folder 'checkpoints'."},
                ),
                "lora_name": choice(
                    (NO_LORA, *host.names("loras")),
                    NO_LORA,
                    "A LoRA from the folder 'loras'; None loads the checkpoint alone.",
                ),
                "lora_strength": _STRENGTH,
            }
        }

    @names_node("Diff2Flow Checkpoint Loader")
    def load(self, ckpt_name: str, lora_name: str, lora_strength: float) -> tuple[Any, Any, Any]:
        host = current()
        model, clip, vae = host.load_checkpoint(ckpt_name)
        host.facts(model)
        if lora_name != NO_LORA:
            state, metadata = _read_lora(lora_name)
            model, clip = host.apply_lora(model, clip, state, lora_strength, metadata)
        return model, clip, vae


class Diff2FlowLoraLoader:
    """Adds a LoRA to a model and hands out the steps and CFG that it was trained for."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "INT", "FLOAT")
    RETURN_NAMES = ("model", "steps", "cfg")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA.",
        "Steps that the LoRA recommends; 25 if it says nothing.",
        "CFG that the LoRA recommends; 7 if it says nothing.",
    )
    SEARCH_ALIASES = ("load lora", "few steps", "recommended steps", "reflow lora")
    DESCRIPTION = (
        "Loads a LoRA, reads from its metadata where sampling starts, and outputs its own recommended steps and CFG:"
        " connect them to a sampler."
    )
    DEFAULT_STEPS, DEFAULT_CFG = 25, 7.0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The base model that the LoRA was trained on."}),
                "lora_name": (current().names("loras"), {"tooltip": "A LoRA from the folder 'loras'."}),
                "strength": _STRENGTH,
            }
        }

    @names_node("Diff2Flow LoRA Loader")
    def load(self, model: Any, lora_name: str, strength: float) -> tuple[Any, int, float]:
        state, metadata = _read_lora(lora_name)
        model, _ = current().apply_lora(model, None, state, strength, metadata)
        steps = int(metadata.get("diff2flow.recommended_steps", self.DEFAULT_STEPS))
        cfg = float(metadata.get("diff2flow.recommended_cfg", self.DEFAULT_CFG))
        return model, steps, cfg


def _read_lora(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    from ..training.lora_file import load_lora

    return load_lora(current().path("loras", name))
