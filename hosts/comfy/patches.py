"""What nodes have put on a MODEL for sampling, which training and the making of pairs do not call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .image_input import show_image

_FUNCTIONS = (
    "model_function_wrapper",
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "denoise_mask_function",
    "context_handler",
)
"""Options of a model that ComfyUI's sampling calls."""

_OWN = show_image.__module__


def sampling_patches(model: Any) -> tuple[str, ...]:
    """The patches of a ModelPatcher that the bare network knows nothing of: "FreeU_V2 (output_block_patch)".

    Weights (LoRAs) and objects put in the place of the network's own are in it when it is trained, and are not named.
    """
    options = model.model_options
    found = [(name, each) for name in _FUNCTIONS for each in _listed(options.get(name))]
    inner = options.get("transformer_options", {})
    found += [(name, each) for name, patches in inner.get("patches", {}).items() for each in _listed(patches)]
    found += [(name, each) for name, patches in inner.get("patches_replace", {}).items() for each in patches.values()]
    found += [("attention", each) for each in _listed(inner.get("optimized_attention_override"))]
    for wrappers in (getattr(model, "wrappers", {}), inner.get("wrappers", {})):
        found += list(_wrappers(wrappers))
    named = [f"{_who(each)} ({where})" for where, each in found if getattr(each, "__module__", "") != _OWN]
    return tuple(dict.fromkeys(named))


def _listed(patches: Any) -> list[Any]:
    if patches is None:
        return []
    return list(patches) if isinstance(patches, (list, tuple)) else [patches]


def _wrappers(by_type: Mapping[str, Mapping[Any, Any]]) -> Iterator[tuple[str, Any]]:
    for kind, by_key in by_type.items():
        for wrappers in by_key.values():
            yield from ((f"{kind} wrapper", each) for each in _listed(wrappers))


def _who(patch: Any) -> str:
    """The class or function that a patch was made in, which is as a rule that of its node."""
    patch = getattr(patch, "__func__", patch)
    name = getattr(patch, "__qualname__", "") or type(patch).__qualname__
    return name.split(".")[0]
