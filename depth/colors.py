"""Depth in colours."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

_MAPS = {"spectral": "Spectral", "turbo": "turbo", "magma": "magma", "viridis": "viridis"}
COLORS = ("grey", *_MAPS)
POLARITIES = ("near_white", "near_black")


def coloured(depth01: Tensor, name: str) -> Tensor:
    """IMAGE (B, H, W, 3) float32 in [0, 1] of a depth in [0, 1], by one of matplotlib's colour maps.

    Args:
        depth01: (B, H, W); clipped to [0, 1]. 0 gets the map's first colour: black for grey, red for spectral.
        name: one of COLORS; grey has equal channels, in full precision.

    Raises:
        ValueError: an unknown name, or values that are not finite.
    """
    if name not in COLORS:
        raise ValueError(f"the colour map must be one of {', '.join(COLORS)}, not {name!r}")
    wrong = int((~depth01.isfinite()).sum())
    if wrong:
        raise ValueError(f"depth has {wrong} values that are NaN or infinite and have no colour; replace them first")
    clipped = depth01.float().clamp(0.0, 1.0)
    if name == "grey":
        return clipped.unsqueeze(-1).repeat(1, 1, 1, 3)
    from matplotlib import colormaps

    pixels = colormaps[_MAPS[name]](clipped.cpu().numpy())[..., :3].astype(numpy.float32)
    return torch.from_numpy(pixels).to(depth01.device)


def shown_depth(depth: Tensor, polarity: str, colours: str) -> Tensor:
    """IMAGE (B, H, W, 3) in [0, 1] of a depth whose near is 0 and far is 1.

    Args:
        depth: (B, H, W); clipped to [0, 1].
        polarity: "near_white", what depth ControlNets take: 1 - depth; or "near_black".
        colours: see `coloured`.

    Raises:
        ValueError: an unknown name, or values that are not finite.
    """
    if polarity not in POLARITIES:
        raise ValueError(f"polarity must be one of {', '.join(POLARITIES)}, not {polarity!r}")
    return coloured(1.0 - depth if polarity == "near_white" else depth, colours)
