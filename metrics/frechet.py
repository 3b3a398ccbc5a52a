"""The Fréchet distance between two sets of features (Heusel et al. 2017, "FID" on Inception's)."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import checked


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the sets' means and covariances.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.

    Args:
        one, two: (N, d), (M, d); N and M at least 2; computed in float64. With N or M below d the covariances are
            singular, which this form bears; the distance is biased upwards all the same.

    Raises:
        ValueError: fewer than two items, unequal numbers of features, or a value that is not finite.
    """
    one, two = checked(one, two)
    first, second = torch.cov(one.T), torch.cov(two.T)
    root = _root(first)
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((one.mean(0) - two.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
