"""What a network is given beside x_diff and tau, made of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .dataset import Batch
from .port import Backbone
from .transfer import to_device


def conditioned(backbone: Backbone, batch: Batch, live_text: bool = False) -> dict[str, Tensor]:
    """What the network takes beside x and tau; with `live_text` captions are encoded now, by the encoders."""
    context, pooled = backbone.text.encode(batch.captions) if live_text else (batch.context, batch.pooled)
    conditioning = on_device(backbone, context, pooled, batch.sizes)
    if batch.image is not None:
        conditioning["image"] = backbone.scale_latent(to_device(batch.image, backbone.device)).float()
    return conditioning


def on_device(backbone: Backbone, context: Tensor, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
    """`Backbone.conditioning`, made where its parts are and then sent to the network's device."""
    made = backbone.conditioning(context, pooled, sizes)
    return {name: to_device(value, backbone.device) for name, value in made.items()}


def beside_image(x_diff: Tensor, image: Tensor | None) -> Tensor:
    """What the first layer takes: x_diff, and where there is an image, its latent behind it: (B, 2C, *dims).

    Args:
        x_diff: (B, C, *dims).
        image: (B, C, *dims) in the network's scale, or None.
    """
    if image is None:
        return x_diff
    with torch.autocast(x_diff.device.type, enabled=False):  # autocast to bf16 refuses to join two tensors in fp16
        return torch.cat([x_diff, image.to(x_diff.dtype)], dim=1)
