"""What images are compared by: features (N, d) of pictures."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..alignment.precision import exact

PIXELS = 4
INCEPTION = "inception"
EXTRACTORS = ("pixels", INCEPTION)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's port of the network that FID and KID are defined by."""
_BATCH = 32


def checked(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64, see `exact`.

    Args:
        one, two: (N, d), (M, d).

    Raises:
        ValueError: fewer than two items, unequal numbers of features, or a value that is not finite.
    """
    if one.ndim != 2 or two.ndim != 2 or min(len(one), len(two)) < 2 or one.shape[1] != two.shape[1]:
        raise ValueError(
            f"two sets of at least 2 items with equal features are needed, not {tuple(one.shape)}, {tuple(two.shape)}"
        )
    for name, features in (("first", one), ("second", two)):
        if not features.isfinite().all():
            raise ValueError(f"the {name} set has features that are not finite: look at its images")
    return exact(one), exact(two)


def pixel_features(pictures: Tensor, side: int = PIXELS) -> Tensor:
    """Mean colours of side × side fields (N, 3 side²): they see colour, brightness and rough shape.

    Args:
        pictures: (N, H, W, 3) in [0, 1].
        side: fields a row.
    """
    return F.interpolate(_pictures(pictures), size=(side, side), mode="area").flatten(1)


def inception_features(pictures: Tensor, weights: Path) -> Tensor:
    """Inception's 2048 features (N, 2048), as FID and KID are published with.

    Args:
        pictures: (N, H, W, 3) in [0, 1]; resized by the network itself.
        weights: torch-fidelity's file, see INCEPTION_FILE.

    Raises:
        ValueError: the file is not there, or torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise ValueError(
            f"the Inception weights are not there: put {weights.name}, a release file of toshas/torch-fidelity on"
            f" GitHub (v0.2.0), into the folder models/{weights.parent.name}, or choose features 'pixels'"
        )
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("features 'inception' need torch-fidelity: pip install torch-fidelity, or choose 'pixels'")
    network = _inception(weights)
    bytes_ = (_pictures(pictures).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    with torch.inference_mode():
        return torch.cat([network(part)[0] for part in bytes_.split(_BATCH)]).float()


def _inception(weights: Path) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    safe = io.BytesIO()  # the library would unpickle anything: it gets tensors that were read as nothing else
    torch.save(torch.load(weights, map_location="cpu", weights_only=True), safe)
    safe.seek(0)
    return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=safe)


def _pictures(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) float32; ValueError for what is no IMAGE."""
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or not math.prod(pictures.shape):
        raise ValueError(f"images must be (N, height, width, 3), not {tuple(pictures.shape)}")
    return pictures.float().movedim(-1, 1)
