"""A network's weights and patches on them, without ever writing into the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of one weight: weight + strength · delta.

    Args:
        target: the parameter's name in the module ("conv_in.weight").
        strength: factor, any sign.
        difference: delta itself, where it is given in full; else
        up, down: delta = scale · (up @ down), reshaped to the weight's shape.
        scale: alpha / rank.
        shape: shape the weight is padded to with zeros before the delta is added, where a LoRA widens it.
        dora_scale: of a DoRA, (out, 1, ...) or (1, in, ...): the patched weight is rescaled by it, see `_decomposed`.
    """

    target: str
    strength: float
    difference: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0
    shape: tuple[int, ...] | None = None
    dora_scale: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """The patched weight, in float32 and its own memory."""
        weight = padded(weight.float(), self.shape)
        if self.difference is not None:
            delta = self.difference.to(weight)
        else:
            delta = torch.mm(self.up.to(weight).flatten(1), self.down.to(weight).flatten(1)) * self.scale
        delta = delta.reshape(weight.shape)
        if self.dora_scale is not None:
            delta = self._decomposed(weight, delta) - weight
        return weight + self.strength * delta

    def _decomposed(self, weight: Tensor, delta: Tensor) -> Tensor:
        """dora_scale · (W + D)/norm as ComfyUI has it: |W| for each output, or |W + D| for each input channel."""
        scale, changed = self.dora_scale.to(weight), weight + delta
        if scale.shape[0] == weight.shape[0]:
            norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
        else:
            norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
        return changed * (scale / (norm + torch.finfo(weight.dtype).eps))

    def tensors(self) -> dict[str, Tensor]:
        """The patch's tensors under names that also tell target and strength, for digests."""
        parts = {"difference": self.difference, "up": self.up, "down": self.down, "dora_scale": self.dora_scale}
        named = {f"{self.target}:{part}:{self.strength}:{self.scale}": value for part, value in parts.items()}
        return {name: value for name, value in named.items() if value is not None}


class Weights:
    """A frozen network that can be had with patches merged in; the network itself is never changed.

    Args:
        module: the network.
        rounding: dtype whose precision merged weights are rounded to; None for the weights' own.
    """

    def __init__(self, module: nn.Module, rounding: torch.dtype | None = None) -> None:
        self.module = module
        self._rounding = rounding
        self._merged: tuple[tuple[Patch, ...], nn.Module] = ((), module)

    def merged(self, patches: Sequence[Patch]) -> nn.Module:
        """The network with the patches merged, for reading only; the latest combination is kept for the next call."""
        effective = tuple(patch for patch in patches if patch.strength != 0)
        if not effective:
            return self.module
        if self._merged[0] != effective:
            self._merged = ((), self.module)  # the old one's memory first
            self._merged = (effective, twin(self.module, self._values(effective)))
        return self._merged[1]

    def trainable(self, patches: Sequence[Patch]) -> nn.Module:
        """A twin of the merged network that may be altered: layers replaced, injected into, set to require gradients.

        Weights that nothing replaces share their memory with the original: train adapters, or copies of weights.
        """
        effective = tuple(patch for patch in patches if patch.strength != 0)
        return twin(self.module, self._values(effective))

    def _values(self, patches: Sequence[Patch]) -> dict[str, Tensor]:
        originals = dict(self.module.named_parameters())
        values: dict[str, Tensor] = {}
        for patch in patches:
            values[patch.target] = patch.apply(values.get(patch.target, originals[patch.target]))
        return {name: self._rounded(value, originals[name].dtype) for name, value in values.items()}

    def _rounded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return (value if self._rounding is None else value.to(self._rounding)).to(dtype)


def twin(module: nn.Module, replaced: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module's structure, sharing the memory of its weights except the `replaced` ones."""
    shared: dict[int, object] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = replaced.get(name, parameter.data)
        shared.setdefault(id(parameter), nn.Parameter(value, requires_grad=False))
    return copy.deepcopy(module, shared)


def padded(weight: Tensor, shape: Sequence[int] | None) -> Tensor:
    """The weight with zeros after its end in every dimension where `shape` is larger; itself if there is no shape."""
    if shape is None or tuple(shape) == tuple(weight.shape):
        return weight
    wide = weight.new_zeros(tuple(shape))
    wide[tuple(slice(0, size) for size in weight.shape)] = weight
    return wide
