"""What tells two of ComfyUI's MODELs, CLIPs and VAEs apart.

In it is all that changes an encoding, a teacher or a run: weights, patches on them however they are kept, tables of the
sampling, the text encoder's layer, tokenizer options and hooks, objects and methods that other packs have replaced.

Not in it, as it changes none of them: a MODEL's options (patches of attention, blocks and CFG, wrappers) and whatever
of its sampling is no table. Training and the teacher of reflow call the network itself, without any of these. Nor can a
VAE be asked whether it encoded in tiles: ComfyUI does so of itself where memory ran out, and no setting makes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...training.identity import Identity
from ..fingerprint import digest, said

CLIP_SKIP = "clip skip"
ENCODERS = ("clip_l", "clip_h", "clip_g")
"""Attributes of ComfyUI's text models, in the order of kohya's lora_te1 and lora_te2."""

_TEXT, _IMAGE = "cond_stage_model", "first_stage_model"
_NETWORK = "diffusion_model"
_SAMPLING = "model_sampling"
_UNSET = ("text_projection.weight", "logit_scale")
"""Weights that SD1 checkpoints do not have: ComfyUI leaves in them what the memory held before."""
_PLAIN = "diff"
"""Kind of a patch that is added, as most are."""


def fingerprint(thing: Any) -> Identity:
    """The identity of a MODEL, CLIP or VAE: samples of its weights and patches, and what else is set on it."""
    patcher = getattr(thing, "patcher", thing)
    settings = {**_kept_aside(thing, patcher), **_replaced(thing)}
    usual = {}
    if hasattr(thing, _TEXT):
        usual = {CLIP_SKIP: _layers(thing, None)}
        settings |= _text_settings(thing, patcher)
    set_here = {name: value for name, value in settings.items() if value and value != usual.get(name)}
    return Identity(digest(_weights(thing, patcher), _patches(patcher)), set_here, usual)


def _text_settings(clip: Any, patcher: Any) -> dict[str, str]:
    """What is set on a CLIP beside its weights."""
    options = getattr(clip, "tokenizer_options", None)
    return {
        CLIP_SKIP: _layers(clip, getattr(clip, "layer_idx", None)),
        "tokenizer options": said(options) if options else "",
        "hooks": _hooks(patcher, getattr(clip, "use_clip_schedule", False)),
    }


def _layers(clip: Any, chosen: int | None) -> str:
    """Which layer each text encoder takes its context from, -1 being the last; one number where it is the same."""
    encoders = {name: getattr(clip.cond_stage_model, name) for name in ENCODERS if hasattr(clip.cond_stage_model, name)}
    if not encoders:
        return "" if chosen is None else str(chosen)
    found = {name: _layer(encoder, chosen) for name, encoder in encoders.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{layer} ({name})" for name, layer in found.items())


def _layer(encoder: Any, chosen: int | None) -> str:
    """ComfyUI takes the last layer where fewer are asked to be left than there are."""
    kind, own = (getattr(encoder, "options_default", None) or ("last", None))[:2]
    if chosen is None:
        chosen = own if kind == "hidden" else None
    elif abs(chosen) > encoder.num_layers:
        chosen = None
    normed = getattr(encoder, "layer_norm_hidden_state", True)
    if chosen is None:
        return "-1" if normed else "last"
    return str(chosen)


def _hooks(patcher: Any, scheduled: bool) -> str:
    """Patches that belong to the hooks which are always on, and their strengths over time where that counts."""
    forced = getattr(patcher, "forced_hooks", None)
    if forced is None:
        return ""
    parts = []
    for hook in forced.hooks:
        patches = patcher.hook_patches.get(hook.hook_ref, {})
        parts.append([sorted(_named(patches).items()), sorted(_unsaid(patches).items())])
        if scheduled:
            keyframes = hook.hook_keyframe.keyframes
            parts.append([[frame.start_percent, frame.strength, frame.guarantee_steps] for frame in keyframes])
    return _shown("set", said(parts))


def _replaced(thing: Any) -> dict[str, str]:
    """Another class than ComfyUI's own around a CLIP or VAE, and methods that were replaced on it."""
    if not (hasattr(thing, _TEXT) or hasattr(thing, _IMAGE)):
        return {}
    own, found = type(thing), {}
    if not own.__module__.startswith("comfy."):
        plain = {k: v for k, v in vars(thing).items() if isinstance(v, (bool, int, float, str))}
        found["class"] = f"{own.__qualname__} {said(plain)}"
    methods = {k: v for k, v in vars(thing).items() if callable(v) and callable(getattr(own, k, None))}
    found |= {f"replaced method {name}": _shown(said(method), said(method)) for name, method in methods.items()}
    return found


def _kept_aside(thing: Any, patcher: Any) -> dict[str, str]:
    """Patches without tensors, and those that are no patches of weights: objects, functions of weights, injections."""
    within = "" if hasattr(thing, _TEXT) or hasattr(thing, _IMAGE) else _NETWORK
    objects = {
        name: value
        for name, value in getattr(patcher, "object_patches", {}).items()
        if name.startswith(within) and not isinstance(value, torch.dtype) and not hasattr(value, "_orig_mod")
    }
    injections = {
        name: [each.inject for each in injected] for name, injected in getattr(patcher, "injections", {}).items()
    }
    kinds = {
        "patches": _unsaid(getattr(patcher, "patches", {})),
        "replaced parts": objects,
        "functions of weights": getattr(patcher, "weight_wrapper_patches", {}),
        "injections": injections,
    }
    return {kind: _shown(", ".join(sorted(values)), said(values)) for kind, values in kinds.items() if values}


def _shown(words: str, text: str) -> str:
    """A few words, and a digest that tells those apart which they do not."""
    return f"{words[:40]} ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _weights(thing: Any, patcher: Any) -> dict[str, Tensor]:
    module = getattr(thing, _TEXT, None) or getattr(thing, _IMAGE, None) or patcher.model
    weights = {**module.state_dict(), **_unpatched(patcher)}
    own = {name: weights[name] for name in weights if not name.startswith(f"{_SAMPLING}.")}
    return {name: weight for name, weight in {**own, **_sampling(patcher)}.items() if not name.endswith(_UNSET)}


def _sampling(patcher: Any) -> dict[str, Tensor]:
    """Tables of a MODEL's own sampling: in the network that clones share, that of the clone sampled last may stand."""
    if not hasattr(patcher.model, _SAMPLING):
        return {}
    sampling = patcher.get_model_object(_SAMPLING)
    tables = {**sampling.state_dict(), "sigmas": sampling.sigmas}  # those of a chosen flow are no buffer
    return {f"{_SAMPLING}.{name}": table for name, table in tables.items()}


def _unpatched(patcher: Any) -> dict[str, Tensor]:
    """The weights that ComfyUI put aside when it merged patches in: whether a model is loaded makes no difference."""
    aside = {key: getattr(entry, "weight", entry) for key, entry in getattr(patcher, "backup", {}).items()}
    return {key: weight for key, weight in aside.items() if isinstance(weight, Tensor)}


def _patches(patcher: Any) -> dict[str, Tensor]:
    """Tensors of the patches by key and position, strengths in the names."""
    return _named(getattr(patcher, "patches", {}))


def _named(all_patches: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for key, patches in all_patches.items():
        for i, patch in enumerate(patches):
            tensors = [v for v in _flat(_value(patch)) if isinstance(v, Tensor)]
            found.update({f"{key}:{i}:{j}:{patch[0]}:{patch[2]}": v for j, v in enumerate(tensors)})
    return found


def _unsaid(all_patches: Mapping[str, Any]) -> dict[str, Any]:
    """By key and position what `_named` does not say of patches: those without tensors, numbers beside the tensors,
    the part of a weight that they are for, functions; nothing for a LoRA whose alpha is its rank."""
    found = {}
    for key, patches in all_patches.items():
        for i, patch in enumerate(patches):
            if more := list(_more(patch)):
                found[f"{key}:{i}"] = more
    return found


def _more(patch: Any) -> Iterator[Any]:
    value = _value(patch)
    leaves = _flat(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        yield [patch[0], patch[2]]
    ranks = {tensor.shape[0] for tensor in tensors[1:2] if tensor.ndim}
    # A shape that a weight is widened to is a list within the value, and follows from the tensors.
    for leaf in leaves if _is_merged(value) else value if isinstance(value, tuple) else ():
        if isinstance(leaf, (bool, int, float, str)) and leaf != _PLAIN and leaf not in ranks:
            yield leaf
    yield from (said(each) for each in patch[3:] if each is not None)


def _is_merged(value: Any) -> bool:
    """Whether a patch is another model's weight with the patches on that, as merging nodes leave it."""
    return isinstance(value, list)


def _value(patch: Any) -> Any:
    return getattr(patch[1], "weights", patch[1])


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _flat(getattr(part, "weights", part))]
    return [value]
