"""How good a depth is: fitted to the truth by scale and shift, then AbsRel, delta1 and RMSE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..alignment.precision import exact
from .choices import SPACES
from .codec import valid_pixels

_DELTA = 1.25
_CONSTANT = 1e-28  # variance by mean square below which float64 cannot tell a map from a constant
_FLOOR = 0.1


def fitted(prediction: Tensor, truth: Tensor, valid: Tensor | None = None, space: str = "log") -> Tensor:
    """Metric depth (B, H, W) float64 (see `exact`): the prediction's least-squares fit to the truth, image by image.

    min over s, c of the sum over valid pixels of (s prediction + c - f(truth))², then f⁻¹ of the fit; f is the log,
    the depth itself or 1/depth. s may be negative, as for disparity fitted in depth. The fit of a constant prediction
    is the mean. In depth and disparity it is held positive: at least a tenth of the truth's smallest.

    Args:
        prediction: (B, H, W), relative in `space`: right up to a scale and a shift.
        truth: (B, H, W) metres; NaN, infinite and non-positive pixels are left out.
        valid: (B, H, W) bool, further pixels to leave out; None leaves out none.
        space: "log", "depth" or "disparity".

    Raises:
        ValueError: shapes that differ, an unknown space, values of the prediction that are not finite, or an image
            without a valid pixel.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, not {space!r}")
    mask = _counted(prediction, truth, valid)
    images = _counted_values(prediction, truth, mask)
    return torch.stack([_fit(image, depth, counts, space) for image, depth, counts in images])


def depth_metrics(prediction: Tensor, truth: Tensor, valid: Tensor | None = None) -> dict[str, Any]:
    """AbsRel, delta1 and RMSE of metric depth p against the truth t; means of each image, then over the images.

    abs_rel = mean |p - t|/t; delta1 = part of the pixels with max(p/t, t/p) < 1.25; rmse = sqrt(mean (p - t)²) in
    metres; pixels = how many counted in all. Calculated in float64.

    Args:
        prediction: (B, H, W) metres; see `fitted` for relative maps.
        truth: (B, H, W) metres; NaN, infinite and non-positive pixels are left out.
        valid: (B, H, W) bool, further pixels to leave out; None leaves out none.

    Raises:
        ValueError: shapes that differ, values of the prediction that are not finite, or not positive where the truth
            is valid, or an image without a valid pixel.
    """
    mask = _counted(prediction, truth, valid)
    wrong = int((mask & (prediction <= 0)).sum())
    if wrong:
        raise ValueError(
            f"prediction has {wrong} pixels that are not positive, so it is no depth in metres; fit it to the truth"
            " first"
        )
    images = _counted_values(prediction, truth, mask)
    rows = torch.stack([_errors(image[counts], depth[counts]) for image, depth, counts in images])
    abs_rel, delta1, rmse = rows.mean(dim=0).tolist()
    return {"abs_rel": abs_rel, "delta1": delta1, "rmse": rmse, "pixels": int(mask.sum())}


def _counted_values(prediction: Tensor, truth: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Prediction, truth (H, W), float64, and mask of each image, together where float64 is."""
    values, depths = exact(prediction), exact(truth)
    return zip(values, depths, mask.to(values.device), strict=True)


def _fit(prediction: Tensor, truth: Tensor, counts: Tensor, space: str) -> Tensor:
    """(H, W): one image's fit in metres."""
    target = {"log": torch.log, "depth": torch.clone, "disparity": torch.reciprocal}[space](truth[counts])
    scale, shift = _scale_and_shift(prediction[counts], target)
    fit = scale * prediction + shift
    if space == "log":
        return fit.clamp(-700.0, 700.0).exp()  # outside the mask anything may stand
    fit = fit.clamp(min=_FLOOR * float(target.min()))
    return fit if space == "depth" else 1.0 / fit


def _scale_and_shift(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    centred = values - values.mean()
    variance = centred.square().mean()
    if variance <= _CONSTANT * values.square().mean():
        return torch.zeros_like(variance), target.mean()
    scale = (centred * (target - target.mean())).mean() / variance
    return scale, target.mean() - scale * values.mean()


def _errors(p: Tensor, t: Tensor) -> Tensor:
    """(3,) AbsRel, delta1, RMSE of (n,) depths."""
    within = torch.maximum(p / t, t / p) < _DELTA
    return torch.stack([((p - t).abs() / t).mean(), exact(within).mean(), (p - t).square().mean().sqrt()])


def _counted(prediction: Tensor, truth: Tensor, valid: Tensor | None) -> Tensor:
    """(B, H, W) bool: the pixels that count."""
    shapes = {"prediction": prediction, "truth": truth, **({} if valid is None else {"valid": valid})}
    if prediction.ndim != 3 or any(tensor.shape != prediction.shape for tensor in shapes.values()):
        listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shapes.items())
        raise ValueError(f"prediction, truth and valid must be (B, H, W) of one size, not {listed}; resize one of them")
    wrong = int((~prediction.isfinite()).sum())
    if wrong:
        raise ValueError(f"prediction has {wrong} values that are NaN or infinite; the model that drew it is broken")
    counted = valid_pixels(truth) if valid is None else valid_pixels(truth) & valid.bool()
    empty = [i for i, mask in enumerate(counted) if not mask.any()]
    if empty:
        raise ValueError(
            f"truth has no valid pixel in image {empty[0] + 1} of {len(truth)}; check its mask and its unit, or leave"
            " the image out"
        )
    return counted
