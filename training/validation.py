"""The flow matching loss on held-out images at fixed times and noises: comparable between steps, and between runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from ..alignment import Alignment
from ..alignment.precision import FLOAT64, exact
from . import draws
from .conditioning import conditioned
from .dataset import Batch
from .lines import Lines
from .objective import Objective
from .port import Backbone, TrainingDataset
from .transfer import to_device

TIMES = 4
MAX_ITEMS = 32


class Validation:
    """E|x_data - x_noise - velocity|² on held-out items, without weights, whatever objective is trained.

    The first MAX_ITEMS items are taken, each at TIMES flow times in the middle of equal parts of [t_min, t_max], with
    noise that depends on seed and item alone; reflow pairs on their own line (`Lines.of_pairs`).

    Args:
        dataset: held out.
        objective: of the run.
        seed: of the run.
        batch_size: items in a network call.
    """

    def __init__(self, dataset: TrainingDataset, objective: Objective, seed: int, batch_size: int) -> None:
        self._dataset, self._objective, self._seed, self._size = dataset, objective, seed, batch_size
        self._lines = Lines(objective, 0)
        first, last = Alignment(objective.schedule, "v").t_range
        self.times = [first + (last - first) * (k + 0.5) / TIMES for k in range(TIMES)]

    def losses(self, backbone: Backbone, encode: object = None) -> dict[str, float]:
        """ "loss", the mean, and "loss_t0.18" and so on for each time."""
        sums = torch.zeros(TIMES, dtype=FLOAT64)
        count = 0
        with torch.no_grad():
            for indices in self._batches():
                batch = self._dataset.batch(indices)
                sums += self._errors(backbone, batch, indices)
                count += len(indices)
        means = (sums / count).tolist()
        named = {f"loss_t{t:.2f}": mean for t, mean in zip(self.times, means, strict=True)}
        return {"loss": sum(means) / TIMES, **named}

    def _errors(self, backbone: Backbone, batch: Batch, indices: list[int]) -> Tensor:
        """Sum over the items of the error at each time (TIMES,)."""
        device = backbone.device
        x_data = backbone.scale_latent(to_device(batch.latent, device)).float()
        x_noise = to_device(self._noise(batch, indices), device)
        if batch.noise is not None:
            x_data, x_noise = self._lines.of_pairs(x_data, x_noise)
        conditioning = conditioned(backbone, batch)
        errors = []
        for t in self.times:
            time = torch.full((len(indices),), t, device=device)
            errors.append(self._objective.flow_matching_error(backbone, x_data, x_noise, time, conditioning).sum())
        return exact(torch.stack(errors).cpu())

    def _noise(self, batch: Batch, indices: list[int]) -> Tensor:
        if batch.noise is not None:
            return batch.noise
        generators = (draws.generator(self._seed, "validation", i) for i in indices)
        return torch.stack([torch.randn(batch.latent.shape[1:], generator=own) for own in generators])

    def _batches(self) -> Iterator[list[int]]:
        """Items of one size together, at most `batch_size`."""
        left = MAX_ITEMS
        for bucket in self._dataset.buckets:
            chosen = list(islice(_unique(bucket), left))
            left -= len(chosen)
            for first in range(0, len(chosen), self._size):
                yield chosen[first : first + self._size]


def _unique(bucket: Sequence[int]) -> Iterator[int]:
    """Its items in their order, each once, without reading on when nobody asks."""
    seen: set[int] = set()
    for item in bucket:
        if item not in seen:
            seen.add(item)
            yield item
