"""Averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Averages:
    """Exponential moving averages of parameters: a ← d a + (1 - d) p after every step.

    d rises from 2/11 to `decay` as (1 + n)/(10 + n), so that the first steps do not linger.

    Args:
        parameters: what is averaged.
        decay: d in the end, [0, 1); 0 keeps no averages.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self.values = [p.detach().clone() for p in parameters] if decay else []

    def update(self, step: int) -> None:
        """After step 0, 1, 2, ..."""
        if self.values:
            decay = min(self._decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand in the parameters while the context lasts."""
        if not self.values:
            yield
            return
        kept = [p.detach().clone() for p in self._parameters]
        try:
            self._copy(self.values)
            yield
        finally:
            self._copy(kept)

    def _copy(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, list(values))
