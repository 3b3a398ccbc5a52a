"""The Fréchet distance between two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the sets' means and covariances.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.

    Args:
        one, two: (N, features), (M, features); N and M at least 2.

    Raises:
        ValueError: fewer than two items, or unequal numbers of features.
    """
    if min(len(one), len(two)) < 2 or one.shape[1:] != two.shape[1:]:
        raise ValueError(f"two sets of at least 2 items with equal features are needed, not {one.shape}, {two.shape}")
    one, two = one.double(), two.double()
    first, second = torch.cov(one.T), torch.cov(two.T)
    root = _root(first)
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((one.mean(0) - two.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
