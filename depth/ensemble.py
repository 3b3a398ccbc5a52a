"""Several predictions of one depth: aligned, merged, and how far they disagree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..alignment.precision import exact
from .choices import REDUCTIONS

_ROUNDS, _CLOSE = 10, 1e-6
_LEAST = 1e-3  # of a scale, as a part of the others' mean: no member is turned around or thrown away


class Ensemble(NamedTuple):
    """Merged predictions.

    Args:
        depth: (B, H, W).
        uncertainty: (B, H, W), in the unit of depth; 0 where all members agree.
    """

    depth: Tensor
    uncertainty: Tensor


def merged(predictions: Tensor, reduction: str = "median") -> Ensemble:
    """Aligns the members to each other by scale and shift, and reduces them to one depth.

    Alternates the members' reduction r with the least squares of each member p_e to it, min over s, c of
    |s p_e + c - r|². The members' mean spread and mean level are held, so that the scales stay positive and the result
    does not shrink. Calculated in float64, returned in the predictions' dtype.

    Args:
        predictions: (E, B, H, W), each affine-invariant: right up to a scale > 0 and a shift.
        reduction: "median", with the median absolute deviation as uncertainty, or "mean", with the standard deviation
            (of the members, not of their mean).

    Raises:
        ValueError: another shape, no member, values that are not finite, or an unknown reduction.
    """
    _check(predictions, reduction)
    if len(predictions) == 1:
        return Ensemble(predictions[0], torch.zeros_like(predictions[0]))
    depths, uncertainties = [], []
    for image in predictions.unbind(dim=1):
        aligned = _aligned(exact(image).flatten(1), reduction)
        depth = _reduced(aligned, reduction)
        away = (aligned - depth).abs()
        spread = _reduced(away, reduction) if reduction == "median" else away.square().mean(dim=0).sqrt()
        depths.append(depth.reshape(image.shape[1:]))
        uncertainties.append(spread.reshape(image.shape[1:]))
    found = (torch.stack(part).to(predictions.dtype) for part in (depths, uncertainties))
    return Ensemble(*(part.to(predictions.device) for part in found))


def flicker(frames: Tensor) -> float:
    """Mean absolute difference of consecutive frames (B, H, W), in their unit.

    Raises:
        ValueError: fewer than two frames.
    """
    if frames.ndim != 3 or len(frames) < 2:
        raise ValueError(f"frames must be (B, H, W) with at least 2 frames, not {tuple(frames.shape)}; give a video")
    return float(exact(frames).diff(dim=0).abs().mean())


def _aligned(members: Tensor, reduction: str) -> Tensor:
    """Members (E, n) by scale and shift on one another."""
    level = members.mean(dim=1, keepdim=True)
    centred = members - level
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    varies = spread > 1e-12 * members.abs().amax(dim=1, keepdim=True)
    unit = torch.where(varies, centred / spread.where(varies, torch.ones_like(spread)), torch.zeros_like(centred))
    scales = torch.ones_like(level)
    for _ in range(_ROUNDS):
        reference = _reduced(scales * unit, reduction)
        before, scales = scales, (unit * (reference - reference.mean())).mean(dim=1, keepdim=True)
        scales = _positive(scales, varies)
        if (scales - before).abs().max() < _CLOSE:
            break
    return level.mean() + spread.mean() * scales * unit


def _positive(scales: Tensor, varies: Tensor) -> Tensor:
    """Scales (E, 1), none near 0 or below, with a mean of 1 over the members that vary."""
    if not varies.any():
        return torch.ones_like(scales)
    scales = scales.clamp(min=0.0)
    mean = scales[varies].mean()
    scales = scales / mean if mean > 0 else torch.ones_like(scales)
    scales = scales.clamp(min=_LEAST)
    return scales / scales[varies].mean()


def _reduced(members: Tensor, reduction: str) -> Tensor:
    """(n,) of (E, n)."""
    if reduction == "mean":
        return members.mean(dim=0)
    ordered, middle = members.sort(dim=0).values, len(members) // 2
    return ordered[middle] if len(members) % 2 else (ordered[middle - 1] + ordered[middle]) / 2.0


def _check(predictions: Tensor, reduction: str) -> None:
    if predictions.ndim != 4 or not len(predictions):
        raise ValueError(
            f"predictions must be (E, B, H, W) with at least one member, not {tuple(predictions.shape)};"
            " stack the members' depths"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    wrong = int((~predictions.isfinite()).sum())
    if wrong:
        raise ValueError(f"predictions have {wrong} values that are not finite; the model that drew them is broken")
