"""What training puts into a network, so that it can be taken out and put back whenever the host handles the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .port import Backbone

Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""

HALF = (torch.float16, torch.bfloat16)


class Insertion(Protocol):
    """Layers or weights that stand in a network in place of its own.

    A host that moves, merges or restores a network's weights finds them by the names they have without training. It
    takes every insertion out first and puts it back afterwards (`Backbone.holding`). Both ways may be asked for twice.

    Attributes:
        network: what it is in.
        inserted: whether it is in place now.
        needs_whole: whether a call works only with all of the network's own weights on its device, merged with all that
            the host merges into them: it stands in place of weights, or reads them.
    """

    network: nn.Module
    inserted: bool
    needs_whole: bool

    def insert(self) -> None:
        """Puts it in place."""

    def remove(self) -> None:
        """Puts the network's own layers or weights back in place."""


class LayerInsertion:
    """Layers in place of others, in place when this is made.

    Args:
        network: what they are in.
        originals: dotted path -> the network's own layer.
        needs_whole: whether they read the weights of the originals, as DoRA does, and do not just call them.
    """

    def __init__(self, network: nn.Module, originals: Mapping[str, nn.Module], needs_whole: bool = False) -> None:
        self.network, self.needs_whole, self._originals = network, needs_whole, dict(originals)
        self._trained = {path: network.get_submodule(path) for path in self._originals}
        self.inserted = True

    def insert(self) -> None:
        """Puts the trained layers in place."""
        self._put(self._trained, True)

    def remove(self) -> None:
        """Puts the network's own layers in place."""
        self._put(self._originals, False)

    def _put(self, layers: Mapping[str, nn.Module], inserted: bool) -> None:
        for path, layer in layers.items():
            replace_layer(self.network, path, layer)
        self.inserted = inserted


class WeightInsertion:
    """Parameters in place of others, in place when this is made.

    The network's own are read anew each time: the host may have replaced them since.

    Args:
        network: what they are in.
        weights: place -> the parameter that stands there while training.
    """

    needs_whole = True

    def __init__(self, network: nn.Module, weights: Mapping[Place, nn.Parameter]) -> None:
        self.network, self._weights = network, dict(weights)
        self._originals: dict[Place, Any] = {}
        self.inserted = False
        self.insert()

    def insert(self) -> None:
        """Puts the weights of the training in place."""
        if self.inserted:
            return
        for (owner, name), weight in self._weights.items():
            self._originals[owner, name] = owner._parameters[name]
            owner._parameters[name] = weight
        self.inserted = True

    def remove(self) -> None:
        """Puts the network's own weights in place."""
        if not self.inserted:
            return
        for (owner, name), original in self._originals.items():
            owner._parameters[name] = original
        self._originals = {}
        self.inserted = False


def replace_layer(network: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts a layer at a dotted path of a network."""
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent)._modules[name] = layer


def own_weights(network: nn.Module) -> list[tuple[Place, nn.Parameter]]:
    """Every floating-point parameter of a network by its place; one that is shared stands at each of its places."""
    return [
        ((owner, name), parameter)
        for owner in network.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    ]


def float32_copies(weights: Sequence[tuple[Place, nn.Parameter]], trained: bool) -> dict[Place, nn.Parameter]:
    """Float32 copies by place, one of each parameter, that require gradients if they are trained."""
    copies: dict[int, nn.Parameter] = {}
    for _, weight in weights:
        if id(weight) not in copies:
            copies[id(weight)] = nn.Parameter(_copied(weight), requires_grad=trained)
    return {place: copies[id(weight)] for place, weight in weights}


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, copy=True)


@contextmanager
def float32_network(backbone: Backbone) -> Iterator[None]:
    """The network computes in float32 while the context lasts: float32 copies of its half-precision weights stand in.

    Memory: 4 bytes for each weight that is kept in 2, beside the original. Nothing is done where it does already.
    """
    if backbone.dtype not in HALF:
        yield
        return
    dtype = backbone.dtype
    half = [(place, weight) for place, weight in own_weights(backbone.module) if weight.dtype in HALF]
    insertion = WeightInsertion(backbone.module, float32_copies(half, trained=False))
    backbone.dtype = torch.float32
    try:
        with backbone.holding(insertion):
            yield
    finally:
        insertion.remove()
        backbone.dtype = dtype
