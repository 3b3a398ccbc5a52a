"""What of a LoRA file a model and its text encoder take, by layer names and shapes, before anything is patched."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..training.lora_keys import LoraKeys, is_text, read_keys
from ..training.lora_kinds import Change, changes, without_middle_of_lokr
from .port import HostError

logger = logging.getLogger(__name__)

_NAMED = 3
"""How many layers a message names."""
_WITH_CLIP = "choose it in Diff2Flow Checkpoint Loader, or load it with Load LoRA (LoraLoader), which take CLIP along"


@dataclass(frozen=True)
class Target:
    """What a LoRA is put on.

    Args:
        shapes: weight shape of every layer of the model and the text encoder, by every name of it that `lora_keys`
            gives and ComfyUI's loader takes.
        family: of the model, for messages.
        has_clip: whether a text encoder is among them.
        widened: shape of the layers that LoRAs before have widened, by the same names.
    """

    shapes: Mapping[str, Sequence[int]]
    family: str
    has_clip: bool
    widened: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class FittingLora:
    """The layers of a LoRA that its target has.

    Args:
        changes: layer -> what is done to its "weight" and its "bias".
        state: the same for ComfyUI's loader, as tensors by kohya's keys.
    """

    changes: Mapping[str, Mapping[str, Change]]
    state: Mapping[str, Tensor]


def fitting(state: Mapping[str, Tensor], target: Target, trained_for: str = "") -> FittingLora:
    """The part of a LoRA that its target has; the rest is said in the log.

    Args:
        state: the LoRA's tensors by key, in any spelling.
        target: what it is put on.
        trained_for: what the LoRA's metadata says of its base, for messages.

    Raises:
        HostError: no layer of the LoRA is there, one has another shape, or is of a kind that cannot be applied.
    """
    try:
        keys = read_keys(state)
    except ValueError as error:
        raise HostError(str(error)) from error
    _require_known_kinds(keys)
    found = {layer: _changes(layer, parts) for layer, parts in keys.layers.items()}
    changed = {layer: change for layer, change in found.items() if change}
    base = f" (its metadata says {trained_for})" if trained_for else ""
    _require_layers(keys, changed, target, base)
    known = {layer: change for layer, change in changed.items() if layer in target.shapes}
    for layer, change in known.items():
        _require_shape(layer, change, target, base)
    _log_unused(keys, changed, target)
    parts = {layer: without_middle_of_lokr(keys.layers[layer]) for layer in known}
    return FittingLora(known, {f"{layer}.{part}": t for layer in known for part, t in parts[layer].items()})


def _require_known_kinds(keys: LoraKeys) -> None:
    if keys.foreign:
        kinds = ", ".join(f"{kind} ({count} tensors)" for kind, count in keys.foreign.items())
        raise HostError(
            f"the LoRA holds {kinds}, which neither ComfyUI's loader nor headless applies: without them it would do"
            " something else than it was trained for; convert it to LoRA, LoHa, LoKr or OFT, or choose another"
        )


def _changes(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Change]:
    try:
        return changes(parts)
    except ValueError as error:
        raise HostError(f"the LoRA's layer '{layer}' cannot be applied: {error}; choose another file") from error


def _require_layers(keys: LoraKeys, changed: Mapping[str, object], target: Target, base: str) -> None:
    """Raises where no layer is there, with the reason."""
    if any(layer in target.shapes for layer in changed):
        return
    if not changed:
        first = next(iter([*keys.others, *keys.layers]), "")
        raise HostError(
            f"the file is no LoRA of a kind that is known here (its first key is '{first}'); choose another"
        )
    text = [layer for layer in changed if is_text(layer)]
    if len(text) == len(changed) and not target.has_clip:
        raise HostError(
            f"the LoRA changes the text encoder only ({len(text)} layers, e.g. '{text[0]}'), and only the model is"
            f" here; {_WITH_CLIP}"
        )
    raise HostError(
        f"none of the LoRA's {len(changed)} layers exists in this {target.family} model{base}: it was made for another"
        f" base model, e.g. {_some(changed)}; choose a LoRA trained for {target.family}"
    )


def _require_shape(layer: str, change: Mapping[str, Change], target: Target, base: str) -> None:
    for kind, part in change.items():
        try:
            part.require_shape(_of(kind, target.shapes[layer]))
        except ValueError as error:
            raise HostError(
                f"the LoRA was made for another base model than this {target.family} model{base}: layer '{layer}' has"
                f" {error}; choose a LoRA trained for {target.family}"
            ) from error
        try:
            if layer in target.widened:
                part.require_shape(_of(kind, target.widened[layer]))
        except ValueError as error:
            raise HostError(
                f"the LoRA's layer '{layer}' has {error}, since a LoRA before it has widened that layer, as those for"
                " depth do; put this LoRA before that one"
            ) from error


def _of(kind: str, shape: Sequence[int]) -> Sequence[int]:
    """Shape of a layer's "weight" or "bias", by its weight's."""
    return shape if kind == "weight" else shape[:1]


def _log_unused(keys: LoraKeys, changed: Mapping[str, object], target: Target) -> None:
    """One sentence for each reason, with numbers and examples."""
    unknown = [layer for layer in changed if layer not in target.shapes]
    text = [layer for layer in unknown if is_text(layer) and not target.has_clip]
    other = [layer for layer in unknown if layer not in text]
    loose = [*keys.others, *(layer for layer in keys.layers if layer not in changed)]
    if text:
        logger.warning(
            "%d of the LoRA's %d layers belong to the text encoder and are left out, since only the model is here; to"
            " apply them too, %s",
            len(text), len(changed), _WITH_CLIP,
        )  # fmt: skip
    if other:
        logger.warning(
            "%d of the LoRA's %d layers are left out, since this %s model has no such layers: %s",
            len(other), len(changed), target.family, _some(other),
        )  # fmt: skip
    if loose:
        logger.warning("%d keys of the LoRA change nothing and are left out: %s", len(loose), _some(loose))


def _some(names: Mapping[str, object] | Sequence[str]) -> str:
    listed = list(names)
    return ", ".join(f"'{name}'" for name in listed[:_NAMED]) + (" …" if len(listed) > _NAMED else "")
