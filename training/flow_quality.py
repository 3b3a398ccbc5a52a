"""How well a model follows a dataset's flow: the flow matching loss at fixed times, and how straight its paths are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..alignment import NaiveFlow
from ..samplers import integrate
from ..samplers.parameterization import FlowParameterization
from ..samplers.straightness import Straightness, straightness
from . import draws
from .conditioning import conditioned
from .objective import Objective, ObjectiveSettings
from .port import Backbone, TrainingDataset
from .transfer import to_device
from .validation import Validation

PATHS, BATCH = 16, 8


@dataclass(frozen=True)
class FlowQuality:
    """What was found.

    Args:
        losses: "loss", the mean of E|x_data - x_noise - velocity|², and "loss_t0.18" and so on for each time.
        paths: of the model from noise, without guidance, for the captions of the first items.
    """

    losses: Mapping[str, float]
    paths: Straightness

    def report(self) -> str:
        """In words."""
        at = ", ".join(
            f"t {name.removeprefix('loss_t')}: {loss:.4g}" for name, loss in self.losses.items() if "_t" in name
        )
        return (
            f"flow matching loss {self.losses['loss']:.4g} ({at})\n"
            f"straightness {self.paths.mean:.4g} ({100 * self.paths.relative:.3g} % of the speed squared), without CFG"
        )  # fmt: skip


def flow_quality(
    backbone: Backbone, dataset: TrainingDataset, flow: FlowParameterization, seed: int, steps: int = 25
) -> FlowQuality:
    """The flow matching loss on a dataset's items, and the straightness of paths for their captions.

    Args:
        backbone: the network.
        dataset: that the model has not seen, or the one it was trained on.
        flow: that the model is sampled along.
        seed: of the noise.
        steps: Euler steps of a path, at least 1.

    Raises:
        ValueError: a dataset without items.
    """
    naive = isinstance(flow.alignment, NaiveFlow)
    prediction = backbone.prediction if naive else flow.alignment.prediction
    settings = ObjectiveSettings("flow_matching" if naive else "diff2flow")
    objective = Objective(settings, flow.alignment.schedule, prediction)
    losses = Validation(dataset, objective, seed, BATCH).losses(backbone)
    return FlowQuality(losses, _paths(backbone, dataset, objective, flow, seed, flow.times(steps)))


@torch.no_grad()
def _paths(
    backbone: Backbone,
    dataset: TrainingDataset,
    objective: Objective,
    flow: FlowParameterization,
    seed: int,
    times: Tensor,
) -> Straightness:
    """Of Euler paths from noise, for items of one size."""
    chosen = list(dict.fromkeys(dataset.buckets[0]))[:PATHS]
    batches = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    parts = [_velocities(backbone, dataset, objective, flow, seed, times, items) for items in batches]
    return straightness(torch.cat(parts, dim=1), times[:-1], times.diff())


def _velocities(
    backbone: Backbone,
    dataset: TrainingDataset,
    objective: Objective,
    flow: FlowParameterization,
    seed: int,
    times: Tensor,
    items: list[int],
) -> Tensor:
    """At the beginning of each step (N, B, *dims), on the CPU."""
    batch, found = dataset.batch(items), []
    conditioning = conditioned(backbone, batch)
    noises = [torch.randn(batch.latent.shape[1:], generator=draws.generator(seed, "paths", item)) for item in items]
    x_noise = to_device(torch.stack(noises), backbone.device)
    first = flow.noisy(torch.tensor(flow.sigma_max), x_noise, torch.zeros_like(x_noise), at_start=True)
    integrate(
        lambda x, t: objective.velocity(backbone, x, t.to(x).expand(len(x)), conditioning),
        first,
        times,
        "euler",
        callback=lambda index, t, x, slope: found.append(slope.float().cpu()),
    )
    return torch.stack(found)
