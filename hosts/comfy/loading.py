"""Checkpoints and LoRAs through ComfyUI's own loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.sd
import folder_paths
from torch import Tensor

from ...training.checkpoint_file import Marks, trained_metadata
from ..lora_fit import Target, fitting
from ..port import HostError
from . import folders, models, recognition
from .image_input import show_image


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
    recognition.note_checkpoint(model, name, trained_metadata(path))
    _heed_marks(model, recognition.marks_of(path))
    return model, clip, vae


def _heed_marks(model: Any, marked: Marks) -> None:
    """Makes a v model of what is marked as v in its file: ComfyUI reads the marks of SDXL files alone."""
    base = model.model
    if not marked.v or base.model_type is not comfy.model_base.ModelType.EPS:
        return
    _make_v(model, marked.zero_terminal_snr)
    init = getattr(model, "cached_patcher_init", None)
    if init is not None:
        model.cached_patcher_init = (_reloaded_as_v, (*init[1][:1], init, marked.zero_terminal_snr))


def _make_v(model: Any, zero_terminal_snr: bool) -> None:
    base = model.model
    base.model_config.sampling_settings["zsnr"] = zero_terminal_snr
    base.model_type = comfy.model_base.ModelType.V_PREDICTION
    base.model_sampling = comfy.model_base.model_sampling(base.model_config, base.model_type)


def _reloaded_as_v(path: str, init: Sequence[Any], zero_terminal_snr: bool, **options: Any) -> Any:
    """ComfyUI's own way to load the model a second time (`cached_patcher_init`), with the marks heeded again."""
    loaded = init[0](*init[1], **options)
    model = loaded[init[2]] if len(init) > 2 else loaded
    _make_v(model, zero_terminal_snr)
    return model


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
    recognition.note_lora(new_model, model, None if metadata is None else dict(metadata))
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
