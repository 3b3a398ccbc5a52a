"""Precision and recall of a set of images (Kynkäänniemi et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..alignment.precision import exact
from .features import checked

NEIGHBOURS = 3
_BLOCK = 1024


def precision_recall(samples: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of the samples that lie among the reference, and share of the reference that lies among the samples.

    A point lies among a set if it is no farther from one of its points than that point's k-th nearest neighbour in the
    set is.

    Args:
        samples, reference: features (N, d), (M, d); N and M above `neighbours`; computed in float64.
        neighbours: k, at least 1; 3 is the authors'.

    Returns:
        precision and recall, in [0, 1].

    Raises:
        ValueError: too few items for so many neighbours, unequal features, or a value that is not finite.
    """
    samples, reference = checked(samples, reference)
    require_enough(len(samples), len(reference), neighbours)
    return _share_among(samples, reference, neighbours), _share_among(reference, samples, neighbours)


def require_enough(samples: int, reference: int, neighbours: int) -> None:
    """Refuses sets that are too small, before anything of them is computed.

    Args:
        samples, reference: how many images each set has.
        neighbours: see `precision_recall`.

    Raises:
        ValueError: no more images than neighbours, or no neighbours.
    """
    if neighbours < 1 or min(samples, reference) <= neighbours:
        raise ValueError(
            f"precision and recall by {neighbours} neighbours need more than so many images in both sets, not"
            f" {samples} in samples and {reference} in reference; give more images, or fewer neighbours (at least 1)"
        )


def _share_among(points: Tensor, among: Tensor, neighbours: int) -> float:
    reach = _reach(among, neighbours)
    inside = [(_distances(rows, among) <= reach).any(dim=1) for rows in points.split(_BLOCK)]
    return float(exact(torch.cat(inside)).mean())


def _reach(points: Tensor, neighbours: int) -> Tensor:
    """Distance (N,) of each point's k-th nearest neighbour; its own is the 0-th."""
    parts = [_distances(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(_BLOCK)]
    return torch.cat(parts)


def _distances(one: Tensor, two: Tensor) -> Tensor:
    return torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")
