"""A network's weights and patches on them, without ever writing into the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...training.lora_kinds import Change


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of one weight.

    Args:
        target: the parameter's name in the module ("conv_in.weight").
        strength: factor, any sign.
        change: what a LoRA file does to it.
    """

    target: str
    strength: float
    change: Change

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape that the weight is widened to; None where it keeps its own."""
        return self.change.shape

    def apply(self, weight: Tensor) -> Tensor:
        """The patched weight, in float32 and its own memory."""
        return self.change.apply(weight.float(), self.strength)

    def tensors(self) -> dict[str, Tensor]:
        """The patch's tensors under names that also tell target, kind and strength, for digests."""
        return {
            f"{self.target}:{self.change.kind}:{part}:{self.strength}": value
            for part, value in self.change.parts.items()
        }


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
