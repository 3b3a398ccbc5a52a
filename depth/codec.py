"""Metric depth as the picture that an autoencoder takes, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..alignment.precision import exact, state_dtype

LOWEST, HIGHEST = 0.01, 0.99
"""The percentiles of the log depth that become -1 and +1."""
FARTHEST = 1e6
"""Metres; programs write 1e10 and the like where nothing was hit."""


class Encoded(NamedTuple):
    """Depth as a picture.

    Args:
        picture: (B, H, W, 3) in [-1, 1], equal channels, near = -1, far = +1.
        low: (B,) float64, the 1st percentile of each image's log depth; on the CPU where its device has no float64.
        high: (B,) float64, the 99th.
    """

    picture: Tensor
    low: Tensor
    high: Tensor


def encode(depth: Tensor, valid: Tensor) -> Encoded:
    """Log depth, affine-normalised by its percentiles: picture = 2 (log depth - low) / (high - low) - 1.

    What lies beyond the percentiles is clipped; invalid pixels become +1 (far). Where low equals high (constant depth)
    the picture is 0. Calculated in float64; the picture is float64 for float64 depth, else float32.

    Args:
        depth: (B, H, W) metres; anything where it is not valid.
        valid: (B, H, W) bool.

    Raises:
        ValueError: shapes that differ, an image without a valid pixel, or a valid pixel that is no positive number.
    """
    _check(depth, valid)
    log = exact(torch.where(valid, depth, torch.ones_like(depth))).log()
    valid = valid.to(log.device)
    bounds = torch.stack([_percentiles(image[mask]) for image, mask in zip(log, valid, strict=True)])
    low, high = bounds.unbind(dim=1)
    span = (high - low)[:, None, None]
    normal = 2.0 * (log - low[:, None, None]) / torch.where(span > 0, span, torch.ones_like(span)) - 1.0
    normal = torch.where(span > 0, normal.clamp(-1.0, 1.0), torch.zeros_like(normal))
    normal = torch.where(valid, normal, torch.ones_like(normal))
    picture = normal.to(state_dtype(depth.dtype)).to(depth.device)
    return Encoded(picture.unsqueeze(-1).repeat(1, 1, 1, 3), low, high)


def decode(picture: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Inverse of `encode`: depth (B, H, W) = exp(low + (mean of the channels + 1)/2 (high - low)) in metres.

    Calculated in float64, returned in the picture's dtype. Values beyond [-1, 1] are continued, not clipped.

    Args:
        picture: (B, H, W, 3), near = -1, far = +1.
        low, high: (B,) log depths that are -1 and +1.

    Raises:
        ValueError: shapes that do not fit.
    """
    if picture.ndim != 4 or low.shape != picture.shape[:1] or high.shape != low.shape:
        raise ValueError(
            f"picture must be (B, H, W, 3) with low and high (B,), not {tuple(picture.shape)}, {tuple(low.shape)} and"
            f" {tuple(high.shape)}; give the three that encode returned together"
        )
    low, high = (exact(bound)[:, None, None] for bound in (low, high))
    log = low + (exact(picture).mean(dim=-1) + 1.0) / 2.0 * (high - low)
    return log.exp().to(picture.dtype).to(picture.device)


def valid_pixels(depth: Tensor, limit: float | None = None) -> Tensor:
    """Where depth, of any shape, is finite and positive and below `limit` metres (None: no limit); bool."""
    valid = depth.isfinite() & (depth > 0)
    return valid if limit is None else valid & (depth < limit)


def latent_mask(valid: Tensor, factor: int = 8) -> Tensor:
    """(B, 1, H/factor, W/factor) float32: 1 where all pixels that a latent stands for are valid, else 0.

    Args:
        valid: (B, H, W) bool.
        factor: pixels of a latent's side.

    Raises:
        ValueError: a side is no multiple of factor.
    """
    height, width = valid.shape[-2:]
    if valid.ndim != 3 or height % factor or width % factor:
        raise ValueError(
            f"valid must be (B, H, W) with sides that are multiples of {factor}, not {tuple(valid.shape)}; resize or"
            " crop depth and mask first"
        )
    blocks = valid.reshape(-1, height // factor, factor, width // factor, factor)
    return blocks.all(dim=4).all(dim=2).float().unsqueeze(1)


def _percentiles(log: Tensor) -> Tensor:
    """(2,): the low and the high percentile of (n,) values, linear between neighbours."""
    ordered = log.sort().values
    places = torch.tensor([LOWEST, HIGHEST], dtype=log.dtype, device=log.device) * (len(ordered) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return ordered[below] + (places - below) * (ordered[above] - ordered[below])


def _check(depth: Tensor, valid: Tensor) -> None:
    if depth.ndim != 3 or depth.shape != valid.shape:
        raise ValueError(
            f"depth and valid must both be (B, H, W), not {tuple(depth.shape)} and {tuple(valid.shape)};"
            " give each image the mask of its own size"
        )
    empty = [i for i, mask in enumerate(valid) if not mask.any()]
    if empty:
        raise ValueError(
            f"depth has no valid pixel in image {empty[0] + 1} of {len(valid)}; check its mask, its unit and the limit"
            " of its range, or leave it out"
        )
    wrong = valid & ~valid_pixels(depth)
    if wrong.any():
        raise ValueError(
            f"depth has {int(wrong.sum())} valid pixels that are no positive number of metres, such as"
            f" {float(depth[wrong][0]):g}; mark them as not valid (valid_pixels does)"
        )
