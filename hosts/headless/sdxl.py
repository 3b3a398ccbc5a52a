"""What SDXL is told beside the prompt: the pooled text embedding and six sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..port import HostError

SIZE_NAMES = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
"""What CONDITIONING calls the sizes, in the network's order."""
_PIXELS = 8
"""Pixels a latent."""


def beside(options: Mapping[str, Any], latent: Tensor, pooled_width: int) -> dict[str, Tensor]:
    """The pooled embedding (b, width) and the sizes (1, 6) of one entry of CONDITIONING, on the latent's device.

    Args:
        options: the entry's options; sizes that it lacks are those of an uncropped image of the latent's size.
        latent: (B, C, h, w).
        pooled_width: what the network takes.

    Raises:
        HostError: no pooled embedding, or one of another width.
    """
    pooled = checked(options.get("pooled_output"), pooled_width)
    return {"pooled": pooled.to(latent), "sizes": torch.tensor([_sizes(options, latent)], device=latent.device)}


def checked(pooled: Tensor | None, width: int) -> Tensor:
    """The pooled embedding (B, width); HostError if it is missing or of another width."""
    if pooled is None:
        raise HostError(
            "the conditioning has no pooled text embedding (pooled_output), which SDXL needs; encode the prompt with"
            " the CLIP of an SDXL checkpoint"
        )
    if pooled.shape[-1] != width:
        raise HostError(
            f"the conditioning's pooled text embedding is {pooled.shape[-1]} wide, the SDXL model takes {width}; encode"
            " the prompt with the CLIP of the same checkpoint"
        )
    return pooled


def _sizes(options: Mapping[str, Any], latent: Tensor) -> list[float]:
    height = options.get("height", latent.shape[-2] * _PIXELS)
    width = options.get("width", latent.shape[-1] * _PIXELS)
    defaults = (height, width, 0, 0, height, width)
    return [float(options.get(name, default)) for name, default in zip(SIZE_NAMES, defaults, strict=True)]
