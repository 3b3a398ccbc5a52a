"""Checkpoints and LoRAs through ComfyUI's own loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.sd
import folder_paths
from torch import Tensor

from ...training.checkpoint_file import trained_metadata
from ..lora_fit import Target, fitting
from ..port import HostError
from . import folders, models
from .image_input import show_image

BASE = "diff2flow.base"
"""Attachment of a ModelPatcher: name of the checkpoint it was loaded from."""


def load_checkpoint(name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE; HostError naming the file if it cannot be read or is no checkpoint."""
    path = folders.path("checkpoints", name)
    try:
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(
            str(path), embedding_directory=folder_paths.get_folder_paths("embeddings")
        )[:3]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HostError(
            f"the checkpoint '{name}' cannot be loaded ({reason}): it is truncated or not a Stable Diffusion"
            " checkpoint; copy it again or choose another"
        ) from error
    if model is None or clip is None:
        raise HostError(
            f"the checkpoint '{name}' has no {'text encoder' if model else 'UNet'}; choose a full checkpoint"
        )
    model.set_attachments(BASE, name)
    trained = trained_metadata(path)
    if trained:
        model.set_attachments(models.LORAS, (trained,))
    return model, clip, vae


def base_file(model: Any) -> tuple[str, Path | None]:
    """Name and file of what a MODEL was loaded from: by Diff2Flow Checkpoint Loader, or by ComfyUI where it tells.

    The name is "" where the file is unknown, or where another model has been merged into it.
    """
    name = model.attachments.get(BASE, "")
    path = folder_paths.get_full_path("checkpoints", name) if name else _loaded_from(model)
    if not path:
        return "", None
    return "" if _is_merged(model) else name or _name_in_folders(path), Path(path)


def _loaded_from(model: Any) -> str | None:
    """The file that newer versions' own loaders remember, to load it again."""
    loader, arguments, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    known = [getattr(comfy.sd, name, None) for name in ("load_checkpoint_guess_config", "load_diffusion_model")]
    is_file = loader in known and bool(arguments) and isinstance(arguments[0], str) and Path(arguments[0]).is_file()
    return arguments[0] if loader is not None and is_file else None


def _is_merged(model: Any) -> bool:
    """Whether a node has mixed another model's weights in, as ModelMergeSimple does; a LoRA's patches add to them."""
    return any(patch[2] != 1.0 or isinstance(patch[1], list) for each in model.patches.values() for patch in each)


def _name_in_folders(path: str) -> str:
    """As ComfyUI's lists show it."""
    for kind in ("checkpoints", "diffusion_models"):
        for folder in folder_paths.get_folder_paths(kind):
            if Path(path).is_relative_to(folder):
                return Path(path).relative_to(folder).as_posix()
    return Path(path).name


def apply_lora(
    model: Any, clip: Any, state: Mapping[str, Tensor], strength: float, metadata: Mapping[str, str] | None
) -> tuple[Any, Any]:
    """Clones with the LoRA added; see `hosts.port.Host.apply_lora`."""
    shapes = _shapes(model, clip)
    target = Target(shapes, models.family(model), clip is not None, _widened(model, shapes))
    found = fitting(state, target, (metadata or {}).get("ss_base_model_version", ""))
    if strength == 0:
        return model.clone(), None if clip is None else clip.clone()
    new_model, new_clip = comfy.sd.load_lora_for_models(model, clip, dict(found.state), strength, strength)
    if metadata is not None:
        new_model.set_attachments(models.LORAS, (*model.attachments.get(models.LORAS, ()), dict(metadata)))
    if models.sees_image(new_model):
        show_image(new_model)
    return new_model, new_clip


def _shapes(model: Any, clip: Any) -> dict[str, tuple[int, ...]]:
    """Weight shapes by the layer names that ComfyUI accepts in LoRA files."""
    weights = dict(model.model.state_dict())
    if clip is not None:
        weights.update(clip.cond_stage_model.state_dict())
    found = _keys(model, clip).items()
    # A weight may have another clone's LoRA on it just now, which may have widened it.
    weights.update({key: kept.weight for key, kept in getattr(model, "backup", {}).items()})
    return {name: tuple(weights[key].shape) for name, key in found if isinstance(key, str) and key in weights}


def _widened(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of the first convolution by its names, where LoRAs or training have widened it."""
    if not models.sees_image(model):
        return {}
    names = [name for name, key in _keys(model, None).items() if key == models.FIRST]
    return {name: (shapes[name][0], models.in_channels(model), *shapes[name][2:]) for name in names}


def _keys(model: Any, clip: Any) -> dict[str, Any]:
    """ComfyUI's own map from names in LoRA files to weights."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    return keys if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
