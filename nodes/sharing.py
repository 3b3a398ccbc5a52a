"""Nodes that write a model for programs that do not know Diff2Flow."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..files import folder_written_whole, free_folder
from ..hosts import HostError, ModelFacts, current
from ..hosts.choice import flow_of
from ..hosts.sharing import require_stock, require_text_to_image_network, trains_text
from ..training.choices import DTYPES
from .errors import names_node
from .products import lost
from .running import written
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
        from ..training.lora_file import free_path

        try:
            return name is None or bool(free_path(current().folder("checkpoints"), name))
        except ValueError as error:
            return f"name: {error}"

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> int:
        """Another number when the file that was written is gone."""
        return lost("Diff2FlowSaveCheckpoint", inputs)

    @names_node("Diff2Flow Save Checkpoint")
    def save(self, model: Any, clip: Any, vae: Any, name: str, save_dtype: str = "fp16") -> dict[str, Any]:
        from ..training.checkpoint_file import write_checkpoint
        from ..training.lora_file import free_path

        host = current()
        facts = host.facts(model)
        require_stock(facts)
        _require_lora(facts)
        _require_text(host, facts, clip)
        folder = host.folder("checkpoints")
        path = free_path(folder, name)
        tensors = {**host.checkpoint(model, clip, vae), **_markers(facts)}
        write_checkpoint(path, tensors, _metadata(facts, path.stem), DTYPES[save_dtype])
        written(path)
        saved = path.relative_to(folder).as_posix()
        return {"ui": {"file": [saved]}, "result": (saved,)}


class Diff2FlowExportDiffusers:
    """Writes a model as a folder for diffusers' pipelines."""

    CATEGORY = CATEGORY
    FUNCTION = "export"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("folder",)
    OUTPUT_TOOLTIPS = ("Path of the folder, for from_pretrained.",)
    SEARCH_ALIASES = ("huggingface", "from_pretrained", "save pretrained", "convert to diffusers", "share model")
    DESCRIPTION = (
        "Writes a model with its LoRAs baked in as a folder that Python's diffusers loads by from_pretrained, with the"
        " matching scheduler (Euler, trailing timesteps) and a page that says how to sample it. Images are those of"
        " Diff2Flow Sampler, but for a LoRA trained from pure noise: diffusers starts a little later, which made 6 to"
        " 10 percent of difference where it was measured."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A Stable Diffusion 1.x, 2.x or SDXL model, with or without LoRAs."}),
                "clip": _CLIP,
                "vae": _VAE,
                "name": line(
                    "my_flow_model",
                    "Name of the folder in 'output/diffusers'; may have subfolders ('flow/my_model'). An existing"
                    " folder stays: the new one gets a number.",
                ),
                "save_dtype": _DTYPE,
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return name is None or bool(free_folder(_exports(), name))
        except ValueError as error:
            return f"name: {error}"

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> int:
        """Another number when the folder that was written is gone."""
        return lost("Diff2FlowExportDiffusers", inputs)

    @names_node("Diff2Flow Export to Diffusers")
    def export(self, model: Any, clip: Any, vae: Any, name: str, save_dtype: str = "fp16") -> dict[str, Any]:
        _require_diffusers()
        host = current()
        facts = host.facts(model)
        require_stock(facts)
        require_text_to_image_network(facts)
        _require_text(host, facts, clip)
        folder = free_folder(_exports(), name)
        with folder_written_whole(folder) as temporary:
            _write(temporary, folder.name, host, (model, clip, vae), facts, DTYPES[save_dtype])
        written(folder)
        return {"ui": {"folder": [str(folder)]}, "result": (str(folder),)}


def _exports() -> Path:
    """Where exported folders are."""
    return current().folder("output") / "diffusers"


def _require_diffusers() -> None:
    lacking = [package for package in ("diffusers", "transformers") if importlib.util.find_spec(package) is None]
    if lacking:
        raise HostError(
            f"the Python package {' and '.join(lacking)} is not installed, and without it nothing can be exported;"
            f" install it into the Python that runs this with 'pip install {' '.join(lacking)}' and restart"
        )


def _write(folder: Path, title: str, host: Any, parts: tuple[Any, Any, Any], facts: ModelFacts, dtype: Any) -> None:
    """Networks, scheduler and page; the headless host's code alone imports diffusers, and is imported when used."""
    from ..hosts.headless.pipeline_card import card
    from ..hosts.headless.pipeline_folder import Pipeline, write_pipeline
    from ..training.metadata import is_lora

    flow, last = flow_of(facts), facts.loras[-1] if facts.loras else {}
    size = _size(last.get("modelspec.resolution", ""), facts.family)
    write_pipeline(folder, Pipeline(host.checkpoint(*parts), host.clip_merges(), flow, dtype, size, title))
    loras = [lora.get("modelspec.title", "") for lora in facts.loras if is_lora(lora)]
    names = {name: f"diff2flow.recommended_{name}" for name in ("steps", "cfg")}
    recommended = {name: float(last[key]) for name, key in names.items() if key in last}
    page = card(title, title, facts.family, flow, loras, recommended, size, str(dtype).removeprefix("torch."))
    (folder / "README.md").write_text(page, encoding="utf-8")


def _size(resolution: str, family: str) -> int:
    """Side of the images that are made unasked, pixels: of a LoRA's square training images, else the family's own."""
    width, _, height = resolution.partition("x")
    if width == height and width.isdigit():
        return int(width)
    return {"SD1": 512, "SD2": 768}.get(family, 1024)


def _require_lora(facts: ModelFacts) -> None:
    from ..training.metadata import is_lora

    if not any(is_lora(lora) for lora in facts.loras):
        raise HostError(
            "model: there is no Diff2Flow LoRA on it, so there is nothing to bake; put Diff2Flow LoRA Loader or"
            " Diff2Flow Checkpoint Loader before it (at a strength other than 0), or save the model as it is by"
            " ComfyUI's CheckpointSave (which forgets what a ModelSamplingDiscrete node has chosen)"
        )


def _require_text(host: Any, facts: ModelFacts, clip: Any) -> None:
    """HostError where a LoRA also trained the text encoder, and the CLIP is without it."""
    from ..training.metadata import is_lora

    name = next((lora.get("modelspec.title", "") for lora in facts.loras if is_lora(lora) and trains_text(lora)), None)
    if name is not None and not host.patched(clip):
        raise HostError(
            f"clip: the LoRA '{name}' trained the text encoder too, and this CLIP is without it; take MODEL and CLIP"
            " both from Diff2Flow Checkpoint Loader with that LoRA, or from ComfyUI's LoraLoader"
        )


def _markers(facts: ModelFacts) -> dict[str, Any]:
    """Tensors without values by which loaders tell v prediction and zero terminal SNR."""
    import torch

    from ..training.checkpoint_file import StoredTensor, mark_names

    alignment = flow_of(facts).alignment
    names = mark_names(alignment.prediction == "v", alignment.schedule.is_zero_terminal_snr)
    return {name: StoredTensor.of(torch.zeros(0)) for name in names}


def _metadata(facts: ModelFacts, title: str) -> dict[str, str]:
    from ..training.metadata import baked_metadata

    flow = flow_of(facts)
    snr = flow.alignment.schedule.is_zero_terminal_snr
    return baked_metadata(facts.loras, title, facts.family, flow.alignment.prediction, flow.start, snr)
