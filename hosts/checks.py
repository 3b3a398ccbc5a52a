"""What both hosts' nodes check before heavy work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .port import HostError


def require_finite_latent(latent: Mapping[str, Any], name: str = "latent_image") -> None:
    """Raises HostError if a LATENT holds NaN or infinity, with their number and the batch items they are in."""
    samples = latent["samples"]
    if torch.isfinite(samples).all():
        return
    bad = ~torch.isfinite(samples).flatten(1)
    items = torch.nonzero(bad.any(dim=1)).flatten().tolist()
    raise HostError(
        f"{name} holds {int(bad.sum())} values that are NaN or infinite (batch items {items}); encode the image again,"
        " or look at the node that made this latent (an fp16 VAE that overflows is the usual cause)"
    )
