"""Depth as ComfyUI's IMAGE and MASK."""

from __future__ import annotations

import torch
from torch import Tensor

from ..alignment.precision import exact
from .metrics import depth_metrics, fitted

_UNEQUAL = 1e-3  # of the values' range: what resizing and 16-bit arithmetic may do to equal channels


def depth_image(depth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """IMAGE (1, H, W, 3) float32 with equal channels, 0 where not valid, and MASK (1, H, W), 1 where valid.

    Args:
        depth: (H, W), any unit.
        valid: (H, W) bool.
    """
    shown = torch.where(valid, depth, torch.zeros_like(depth)).float()
    return as_image(shown[None]), valid[None].float()


def as_image(depth: Tensor) -> Tensor:
    """IMAGE (B, H, W, 3) float32 with equal channels of a depth (B, H, W), as it is."""
    return depth.float()[..., None].repeat(1, 1, 1, 3)


def depth_of(image: Tensor, name: str) -> Tensor:
    """(B, H, W): the depth that an IMAGE (B, H, W, 3) carries in equal channels; NaN and infinite values stay.

    Args:
        image: the IMAGE.
        name: of the input.

    Raises:
        ValueError: another shape, or channels that differ: a colour picture.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3):
        raise ValueError(f"{name} must be an IMAGE (B, H, W, 3), not {tuple(image.shape)}; connect raw depth")
    known = image.isfinite().all(dim=-1)
    values = exact(image[known])
    if len(values) and values.shape[-1] == 3:
        apart = float((values.amax(dim=-1) - values.amin(dim=-1)).max())
        if apart > _UNEQUAL * max(float(values.max() - values.min()), 1e-6):
            raise ValueError(
                f"{name} is a colour picture, not depth: its channels differ by up to {apart:.3g}; connect raw depth,"
                " not the preview or the photo"
            )
    return image[..., 0]


def compared(
    prediction: Tensor, truth: Tensor, mask: Tensor | None = None, space: str = "log"
) -> tuple[str, float, float, float]:
    """The metrics of a raw IMAGE against one in metres: a report in words, AbsRel, delta1, RMSE in metres.

    Args:
        prediction: IMAGE (B, H, W, 3), relative in `space`.
        truth: IMAGE (B, H, W, 3) in metres.
        mask: MASK (B, H, W), or (1, H, W) for all; above 0.5 counts. None: wherever truth is positive and finite.
        space: of `metrics.fitted`.

    Raises:
        ValueError: sizes or numbers of images that differ, colour pictures, or what `metrics.fitted` raises.
    """
    depth, metres = depth_of(prediction, "prediction"), depth_of(truth, "truth")
    _one_size("prediction", depth, "truth", metres)
    counts = None
    if mask is not None:
        counts = (mask if mask.ndim == 3 else mask[None]) > 0.5
        counts = counts.expand(len(depth), -1, -1) if len(counts) == 1 else counts
        _one_size("valid", counts, "truth", metres)
    found = depth_metrics(fitted(depth, metres, counts, space), metres, counts)
    abs_rel, delta1, rmse = found["abs_rel"], found["delta1"], found["rmse"]
    report = (
        f"AbsRel {abs_rel:.4f}, delta1 {delta1:.4f}, RMSE {rmse:.4g} m over {found['pixels']} pixels of {len(depth)}"
        f" {'image' if len(depth) == 1 else 'images'}, fitted by scale and shift in {space}"
    )
    return report, abs_rel, delta1, rmse


def _one_size(name: str, depth: Tensor, other_name: str, other: Tensor) -> None:
    if depth.shape[1:] != other.shape[1:]:
        sizes = [f"{tensor.shape[2]}×{tensor.shape[1]} px" for tensor in (depth, other)]
        raise ValueError(
            f"{name} is {sizes[0]} and {other_name} {sizes[1]}; they must be of one size: resize {name} to"
            f" {sizes[1]} first"
        )
    if len(depth) != len(other):
        raise ValueError(
            f"{name} has {len(depth)} images and {other_name} {len(other)}; give as many of one as of the other"
        )
