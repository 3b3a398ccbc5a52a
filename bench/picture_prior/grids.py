"""Many pictures as one image."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def rows(pictures: Tensor, columns: int) -> Tensor:
    """(B/columns · H, columns · W, 3) of pictures (B, H, W, 3)."""
    count, height, width, channels = pictures.shape
    laid = pictures.reshape(count // columns, columns, height, width, channels).transpose(1, 2)
    return laid.reshape(count // columns * height, columns * width, channels)


def save(image: Tensor, path: Path, scale: int = 1) -> None:
    """Writes an image (H, W, 3) in [0, 1] as PNG, each pixel as a square of `scale`."""
    from PIL import Image

    pixels = (image.clamp(0.0, 1.0) * 255.0).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)).save(path)
