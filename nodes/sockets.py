"""Whether what comes into a node is what it declares: links by API and nodes that take anything bring other things."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from ..hosts import HostError

_OPAQUE = ("MODEL", "CLIP", "VAE")
"""Objects of the host, taken for what they are unless they are known to be something else."""

_SIGNS = {
    "CLIP": ("cond_stage_model", "towers"),
    "VAE": ("first_stage_model",),
    "MODEL": ("model_options", "as_flow"),
    "CONTROL_NET": ("set_cond_hint",),
    "SAMPLER": ("sampler_function", "max_denoise"),
    "D2F_DATASET": ("image_channels",),
}
"""Attributes that tell objects of both hosts, and of several classes, apart."""

_CLASSES = {
    "LoraSettings": "D2F_LORA",
    "ObjectiveSettings": "D2F_LOSS",
    "OptimizerSettings": "D2F_OPTIMIZER",
    "WatchConfig": "D2F_WATCH",
    "Autoencoder": "VAE",
}


def require_kinds(declared: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raises HostError where an input's value is not of the type that the node declares, or is no finite number.

    Args:
        declared: type and options of the node's inputs, by name.
        inputs: their values; None is left to the node.
    """
    for name, value in inputs.items():
        if name in declared and value is not None:
            kind, options = declared[name]
            _require_kind(name, "STRING" if isinstance(kind, list) else kind, value)
            if kind == "FLOAT" and not math.isfinite(value):
                raise HostError(f"{name} must be a finite number, not {value}; {options.get('default')} is the default")


def _require_kind(name: str, wanted: str, value: Any) -> None:
    found = kind_of(value)
    if found in _ALLOWED.get(wanted, (wanted,)) or (not found and wanted in _OPAQUE):
        return
    what = f"{value!r} ({found})" if found in _PLAIN else found or f"an object of class {type(value).__name__}"
    raise HostError(f"{name} takes {wanted}, and what came in is {what}; connect an output of type {wanted}")


def kind_of(value: Any) -> str:
    """The type of the sockets that such a value goes through, "" where it cannot be told."""
    return next((name for name, test in _PLAIN.items() if test(value)), "") or _kind_of_object(value)


def _kind_of_object(value: Any) -> str:
    if type(value).__name__ in _CLASSES:
        return _CLASSES[type(value).__name__]
    if isinstance(value, Mapping):
        return "LATENT" if "samples" in value else "AUDIO" if "waveform" in value else ""
    if isinstance(value, (list, tuple)):
        pairs = all(isinstance(each, (list, tuple)) and len(each) == 2 and _is_tensor(each[0]) for each in value)
        return "CONDITIONING" if pairs else ""
    if _is_tensor(value):
        return {1: "SIGMAS", 2: "MASK", 3: "MASK", 4: "IMAGE"}.get(value.ndim, "")
    return next((kind for kind, signs in _SIGNS.items() if any(hasattr(value, sign) for sign in signs)), "")


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "ndim") and hasattr(value, "dtype")


_PLAIN: Mapping[str, Callable[[Any], bool]] = {
    "BOOLEAN": lambda value: isinstance(value, bool),
    "INT": lambda value: isinstance(value, Integral),
    "FLOAT": lambda value: isinstance(value, Real),
    "STRING": lambda value: isinstance(value, str),
}
_ALLOWED = {
    "FLOAT": ("FLOAT", "INT"),
    "BOOLEAN": ("BOOLEAN", "INT"),
    "INT": ("INT", "BOOLEAN"),
    "IMAGE": ("IMAGE", "MASK", "SIGMAS"),
    "MASK": ("MASK", "IMAGE"),
}
"""Pictures of other shapes have sentences of their own."""
