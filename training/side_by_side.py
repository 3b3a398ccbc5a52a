"""Pictures side by side in one, each column with its title."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PAPER, _TEXT = (246, 245, 242), (34, 37, 43)
_GAP_SHARE, _TEXT_SHARE = 0.04, 0.14
_SMALLEST_TEXT, _LARGEST_TEXT = 10, 40


def side_by_side(columns: Sequence[tuple[str, Tensor]]) -> Tensor:
    """IMAGE (1, H, W, 3) float32 in [0, 1]: a column for each title, its pictures one below the other.

    Args:
        columns: titles and IMAGEs (B, h, w, 3), all of one shape.

    Raises:
        ValueError: no column, or IMAGEs of different shapes.
    """
    shapes = {tuple(pictures.shape) for _, pictures in columns}
    if len(shapes) != 1:
        raise ValueError(f"the columns must have one shape (B, h, w, 3), not {sorted(shapes)}")
    [(count, height, width, _)] = shapes
    gap, font = max(2, round(_GAP_SHARE * width)), _font(width, [title for title, _ in columns])
    head = round(font.size * 1.6)
    page = Image.new("RGB", (len(columns) * (width + gap) + gap, head + count * (height + gap)), _PAPER)
    draw = ImageDraw.Draw(page)
    for i, (title, _) in enumerate(columns):
        draw.text((gap + i * (width + gap) + width / 2, head / 2), title, _TEXT, font, anchor="mm")
    made = torch.from_numpy(numpy.array(page)).float() / 255.0
    for i, (_, pictures) in enumerate(columns):
        for j, picture in enumerate(pictures):
            top, left = head + j * (height + gap), gap + i * (width + gap)
            made[top : top + height, left : left + width] = picture.detach().float().cpu().clamp(0.0, 1.0)
    return made.unsqueeze(0)


def _font(width: int, titles: Sequence[str]) -> ImageFont.FreeTypeFont:
    """As large as suits the width, and small enough for every title to stay within its column."""
    wanted = min(_LARGEST_TEXT, max(_SMALLEST_TEXT, round(_TEXT_SHARE * width)))
    font = ImageFont.load_default(wanted)
    widest = max(font.getlength(title) for title in titles)
    return font if widest <= 0.9 * width else ImageFont.load_default(max(6, wanted * 0.9 * width / widest))
