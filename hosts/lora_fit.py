"""Whether a LoRA file fits a model, by layer names and shapes, before anything is patched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .port import HostError

_ENDINGS = (".lora_down.weight", ".lora_up.weight", ".alpha", ".diff", ".diff_b", ".dora_scale", ".reshape_weight")


def layers_of(state: Mapping[str, Tensor]) -> list[str]:
    """Layer names in a LoRA state dict, in kohya's spelling and in the file's order."""
    found: dict[str, None] = {}
    for key in state:
        ending = next((e for e in _ENDINGS if key.endswith(e)), None)
        if ending:
            found[key.removesuffix(ending)] = None
    return list(found)


def require_fit(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], family: str, trained_for: str = ""
) -> None:
    """Raises if a LoRA belongs to another base model.

    Args:
        state: the LoRA's tensors by key.
        shapes: weight shape of every layer of the model (and text encoder) by the name that LoRA files use.
        family: of the model, for the message.
        trained_for: what the LoRA's metadata says of its base, for the message.

    Raises:
        HostError: no layer of the LoRA exists in the model, or one has another shape.
    """
    layers = layers_of(state)
    known = [layer for layer in layers if layer in shapes]
    base = f" (its metadata says {trained_for})" if trained_for else ""
    if layers and not known:
        raise HostError(
            f"none of the LoRA's {len(layers)} layers exists in this {family} model{base}: it was made for another"
            f" base model, e.g. '{layers[0]}'; choose a LoRA trained for {family}"
        )
    for layer in known:
        misfit = _misfit(state, layer, shapes[layer])
        if misfit:
            raise HostError(
                f"the LoRA was made for another base model than this {family} model{base}: layer '{layer}' has"
                f" {misfit}; choose a LoRA trained for {family}"
            )


def _misfit(state: Mapping[str, Tensor], layer: str, shape: Sequence[int]) -> str:
    """How the LoRA's tensors differ from the layer's weight shape, "" if they fit."""
    if f"{layer}.reshape_weight" in state:
        return ""
    down, up = state.get(f"{layer}.lora_down.weight"), state.get(f"{layer}.lora_up.weight")
    if down is not None and up is not None:
        lora = (up.shape[0], down.shape[1])
        if lora != tuple(shape[:2]):
            return f"{lora[1]} inputs and {lora[0]} outputs where the model has {shape[1]} and {shape[0]}"
    dora_scale = state.get(f"{layer}.dora_scale")
    if dora_scale is not None and dora_scale.numel() not in shape[:2]:
        return f"a dora_scale of {dora_scale.numel()} where the model has {shape[0]} outputs and {shape[1]} inputs"
    difference = state.get(f"{layer}.diff")
    if difference is not None and tuple(difference.shape) != tuple(shape):
        return f"shape {tuple(difference.shape)} where the model has {tuple(shape)}"
    return ""
