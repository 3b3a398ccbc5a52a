"""Nodes that write a model for programs that do not know Diff2Flow."""

from __future__ import annotations

from typing import Any

from ..hosts import HostError, ModelFacts, current
from ..hosts.choice import flow_of
from ..hosts.sharing import require_stock, trains_text
from ..training.lora_file import free_path
from ..training.metadata import baked_metadata, is_lora
from ..training.product import DTYPES
from .errors import names_node
from .widgets import choice, line

CATEGORY = "Diff2Flow/saving"

_DTYPE = choice(
    tuple(DTYPES),
    "fp16",
    "Precision of the saved weights, in bits a number. fp16: 16, what everybody shares; bf16: 16, coarser, for weights"
    " too large for fp16; fp32: 32, twice the size, no rounding.",
)
_CLIP = ("CLIP", {"tooltip": "The text encoder, with the LoRA if that trained it."})
_VAE = ("VAE", {"tooltip": "The autoencoder; it is saved as it is."})


class Diff2FlowSaveCheckpoint:
    """Bakes the LoRAs on a model into a checkpoint."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("name",)
    OUTPUT_TOOLTIPS = ("Name of the checkpoint in the folder 'checkpoints', as the checkpoint loaders list it.",)
    SEARCH_ALIASES = ("bake lora", "merge lora", "checkpoint save", "export safetensors", "share model")
    DESCRIPTION = (
        "Bakes the Diff2Flow LoRAs on a model into an ordinary checkpoint file, which loads and samples in stock nodes"
        " and in other programs. The file also tells Diff2Flow nodes how it is sampled."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model with one or more Diff2Flow LoRAs on it, at their strengths."}),
                "clip": _CLIP,
                "vae": _VAE,
                "name": line(
                    "my_flow_model",
                    "Name of the file in the folder 'checkpoints', without ending; may have subfolders"
                    " ('flow/my_model'). An existing file stays: the new one gets a number.",
                ),
                "save_dtype": _DTYPE,
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return name is None or bool(free_path(current().folder("checkpoints"), name))
        except ValueError as error:
            return f"name: {error}"

    @names_node("Diff2Flow Save Checkpoint")
    def save(self, model: Any, clip: Any, vae: Any, name: str, save_dtype: str = "fp16") -> tuple[str]:
        from ..training.checkpoint_file import write_checkpoint

        host = current()
        facts = host.facts(model)
        require_stock(facts)
        _require_lora(facts)
        _require_text(host, facts, clip)
        folder = host.folder("checkpoints")
        path = free_path(folder, name)
        tensors = {**host.checkpoint(model, clip, vae), **_markers(facts)}
        write_checkpoint(path, tensors, _metadata(facts, path.stem), DTYPES[save_dtype])
        return (path.relative_to(folder).as_posix(),)


def _require_lora(facts: ModelFacts) -> None:
    if not any(is_lora(lora) for lora in facts.loras):
        raise HostError(
            "model: there is no Diff2Flow LoRA on it, so there is nothing to bake; put Diff2Flow LoRA Loader or"
            " Diff2Flow Checkpoint Loader before it (at a strength other than 0), or save the model as it is by ComfyUI's"
            " CheckpointSave"
        )


def _require_text(host: Any, facts: ModelFacts, clip: Any) -> None:
    """HostError where a LoRA also trained the text encoder, and the CLIP is without it."""
    name = next((lora.get("modelspec.title", "") for lora in facts.loras if is_lora(lora) and trains_text(lora)), None)
    if name is not None and not host.patched(clip):
        raise HostError(
            f"clip: the LoRA '{name}' trained the text encoder too, and this CLIP is without it; take MODEL and CLIP"
            " both from Diff2Flow Checkpoint Loader with that LoRA, or from ComfyUI's LoraLoader"
        )


def _markers(facts: ModelFacts) -> dict[str, Any]:
    """Tensors without values by which loaders tell v prediction and zero terminal SNR."""
    import torch

    from ..training.checkpoint_file import StoredTensor

    alignment = flow_of(facts).alignment
    names = ["v_pred"] if alignment.prediction == "v" else []
    names += ["ztsnr"] if alignment.schedule.is_zero_terminal_snr else []
    return {name: StoredTensor.of(torch.zeros(0)) for name in names}


def _metadata(facts: ModelFacts, title: str) -> dict[str, str]:
    flow = flow_of(facts)
    snr = flow.alignment.schedule.is_zero_terminal_snr
    return baked_metadata(facts.loras, title, facts.family, flow.alignment.prediction, flow.start, snr)
