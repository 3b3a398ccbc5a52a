"""The kernel distance between two sets of features (Bińkowski et al. 2018, "KID" on Inception's)."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import checked

DEGREE = 3
_BLOCK = 1024


def kernel_distance(one: Tensor, two: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x·y / d + 1)³.

    sum over i≠j of k(x_i, x_j)/(N(N-1)) + sum over i≠j of k(y_i, y_j)/(M(M-1)) - 2 sum of k(x_i, y_j)/(N M), over all
    pairs at once and not over drawn subsets: the same features give the same number. It may be a little below 0.

    Args:
        one, two: (N, d), (M, d); N and M at least 2; computed in float64.

    Raises:
        ValueError: fewer than two items, unequal numbers of features, or a value that is not finite.
    """
    one, two = checked(one, two)
    return _within(one) + _within(two) - 2.0 * _kernel_sum(one, two) / (len(one) * len(two))


def _within(x: Tensor) -> float:
    """Mean of the kernel over all pairs of different items."""
    same = (x.square().sum(dim=1) / x.shape[1] + 1.0).pow(DEGREE).sum()
    return (_kernel_sum(x, x) - float(same)) / (len(x) * (len(x) - 1))


def _kernel_sum(one: Tensor, two: Tensor) -> float:
    """Sum over all pairs, a block of rows at a time."""
    parts = ((rows @ two.T / one.shape[1] + 1.0).pow(DEGREE).sum() for rows in one.split(_BLOCK))
    return float(torch.stack(list(parts)).sum())
