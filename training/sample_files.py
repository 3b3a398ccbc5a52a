"""Samples drawn while training, as PNG files and as one small preview."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image
from torch import Tensor

from ..files import written_whole

_PREVIEW = 512


def save_samples(
    folder: Path, step: int, pictures: Sequence[tuple[str, Tensor]]
) -> tuple[list[Path], Image.Image | None]:
    """Writes each picture as step_00000100_<title>.png, its batch side by side.

    Args:
        folder: made if it is missing.
        step: of the run.
        pictures: pairs of a short title and an IMAGE (B, H, W, 3) in [0, 1].

    Returns:
        The files, and the pictures below each other as one preview (None if there are none).
    """
    rows, paths = [], []
    for title, image in pictures:
        rows.append(_row(image))
        paths.append(folder / f"step_{step:08d}_{re.sub(r'[^A-Za-z0-9]+', '_', title).strip('_')}.png")
        with written_whole(paths[-1]) as temporary:
            rows[-1].save(temporary, format="PNG")
    return paths, _stacked(rows) if rows else None


def _row(image: Tensor) -> Image.Image:
    side_by_side = image.detach().cpu().float().clamp(0, 1).movedim(0, 1).flatten(1, 2)
    return Image.fromarray((side_by_side * 255).round().byte().numpy().astype(numpy.uint8))


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    page.thumbnail((_PREVIEW, _PREVIEW))
    return page
