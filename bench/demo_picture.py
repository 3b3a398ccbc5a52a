"""The demo's pictures: samples before and after at several numbers of steps, a curve, and what is in the LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import written_whole

_PAPER, _CARD, _TEXT, _FAINT, _ACCENT = "#f6f5f2", "#ffffff", "#22252b", "#7a7f8a", "#b8860b"
_MARGIN, _GAP, _PAD = 48, 20, 14
_LABEL, _PLOT = 190, 490
_TITLE_HEIGHT, _FACTS_HEIGHT = 118, 150
_SUBTITLE = "equal seeds and prompts in every cell; Euler steps along the aligned flow"
_SHOWN_METADATA = (
    ("objective", "diff2flow.objective"),
    ("prediction", "diff2flow.prediction"),
    ("starts at", "diff2flow.start"),
    ("recommended steps", "diff2flow.recommended_steps"),
    ("recommended cfg", "diff2flow.recommended_cfg"),
    ("base checkpoint", "diff2flow.base_name"),
    ("base checkpoint", "ss_sd_model_name"),
    ("rank", "ss_network_dim"),
    ("steps trained", "ss_steps"),
)


@dataclass(frozen=True)
class Row:
    """Diff2Flow Steps Grid's picture of one model, its name and some words in lines."""

    name: str
    notes: Sequence[str]
    grid: Image.Image


def compose(title: str, rows: Sequence[Row], plots: Sequence[Image.Image], lora_path: Path, out: Path) -> Path:
    """Writes the picture (PNG) and returns its path.

    Args:
        title: over everything.
        rows: before and after.
        plots: one beside each row, or one beside all of them.
        lora_path: the LoRA's .safetensors file.

    Raises:
        ValueError: another number of plots.
    """
    if len(plots) not in (1, len(rows)):
        raise ValueError(f"{len(plots)} plots beside {len(rows)} rows: give one, or one for each row")
    inside = max(row.grid.width for row in rows) + 2 * _PAD
    width = 2 * _MARGIN + _LABEL + inside + _GAP + _PLOT
    heights = [row.grid.height + 2 * _PAD for row in rows]
    tops = [_TITLE_HEIGHT + sum(heights[:i]) + i * _GAP for i in range(len(rows))]
    bottom = tops[-1] + heights[-1]
    page = Image.new("RGB", (width, bottom + _GAP + _FACTS_HEIGHT + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 34), title, _TEXT, _font(34))
    draw.text((_MARGIN, 80), _SUBTITLE, _FAINT, _font(18))
    for row, top, height in zip(rows, tops, heights, strict=True):
        _row(page, draw, (_MARGIN, top, inside, height), row)
    sides = list(zip(tops, heights, strict=True)) if len(plots) > 1 else [(tops[0], bottom - tops[0])]
    for plot, (top, height) in zip(plots, sides, strict=True):
        _card(page, draw, (_MARGIN + _LABEL + inside + _GAP, top, _PLOT, height), plot)
    _facts(draw, bottom + _GAP + 16, width, facts(lora_path)[:8])
    with written_whole(Path(out)) as temporary:
        page.save(temporary, format="PNG")
    return Path(out)


def _row(page: Image.Image, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], row: Row) -> None:
    """A row's words and, beside them, its grid in a card at (left, top, width, height)."""
    left, top, inside, height = box
    draw.text((left, top + height // 2 - 44), row.name, _TEXT, _font(28))
    for i, note in enumerate(row.notes):
        draw.text((left, top + height // 2 - 4 + 24 * i), note, _FAINT, _font(18))
    draw.rounded_rectangle((left + _LABEL, top, left + _LABEL + inside, top + height), 10, _CARD)
    page.paste(row.grid, (left + _LABEL + _PAD, top + _PAD))


def _facts(draw: ImageDraw.ImageDraw, top: int, width: int, lines: Sequence[tuple[str, str]]) -> None:
    """What is in the LoRA, in two columns."""
    for i, (name, value) in enumerate(lines):
        x, y = _MARGIN + (i % 2) * (width // 2), top + 34 * (i // 2)
        draw.text((x, y), name, _FAINT, _font(19))
        draw.text((x + _LABEL, y), _shortened(draw, value, width // 2 - 240), _TEXT if i else _ACCENT, _font(19))


def _card(page: Image.Image, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], picture: Image.Image) -> None:
    """A picture in a card at (left, top, width, height), as large as fits."""
    left, top, width, height = box
    draw.rounded_rectangle((left, top, left + width, top + height), 10, _CARD)
    scale = min((width - 2 * _PAD) / picture.width, (height - 2 * _PAD) / picture.height)
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS)
    page.paste(small, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))


def facts(lora_path: Path) -> list[tuple[str, str]]:
    """What there is to say about a LoRA file, as (name, value)."""
    from safetensors import safe_open

    path = Path(lora_path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        names = list(file.keys())
        shapes = [file.get_slice(name).get_shape() for name in names]
    layers = sum(name.endswith(".lora_down.weight") for name in names)
    found = [
        ("file", path.name),
        ("size", f"{path.stat().st_size / 1e6:.2f} MB"),
        ("parameters", f"{sum(math.prod(shape) for shape in shapes):,}"),
        ("layers", f"{layers} low-rank"),
    ]
    for name, key in _SHOWN_METADATA:
        if metadata.get(key) and name not in dict(found):
            found.append((name, metadata[key]))
    return found


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text cut with an ellipsis so that it fits."""
    font = _font(19)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
