"""A training that goes step by step, begins where it is told, and bears weights in any memory format."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..short_training import ShortTraining


class LongTraining(ShortTraining):
    """See ShortTraining."""

    def one(self, loss: Callable[[torch.Generator], Tensor]) -> float:
        """One step; returns its loss."""
        return self._one(loss)

    def averaged_copy(self) -> nn.Module:
        """The network with the averaged weights; training goes on."""
        network = copy.deepcopy(self.module).requires_grad_(False)
        with torch.no_grad():
            for parameter, average in zip(network.parameters(), self._averages, strict=True):
                parameter.copy_(average)
        return network

    def _restore(self) -> None:
        """The fused optimizer reads moments in the order in which the weights lie in memory."""
        super()._restore()
        for parameter, state in self._optimizer.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value).detach()
