"""The demo's pictures: samples before and after at several numbers of steps, a curve, and what is in the LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import written_whole

_PAPER, _CARD, _TEXT, _FAINT, _ACCENT = "#f6f5f2", "#ffffff", "#22252b", "#7a7f8a", "#b8860b"
_MARGIN, _GAP, _PAD = 48, 20, 14
_LABEL, _CELL = 190, 330
_LOWER = 430
_TITLE_HEIGHT, _HEAD_HEIGHT = 118, 44
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


def compose(
    base: Mapping[int, Sequence[Image.Image]],
    tuned: Mapping[int, Sequence[Image.Image]],
    loss_plot: Image.Image,
    lora_path: Path,
    out: Path,
    title: str = "Diff2Flow: a tiny prior learns a style that it has never seen",
) -> Path:
    """Writes the picture (PNG) and returns its path.

    Args:
        base, tuned: samples by number of steps, the same seeds in the same order in every cell.
        loss_plot: the train node's loss curve.
        lora_path: the LoRA's .safetensors file.

    Raises:
        ValueError: the two have different numbers of steps, or a cell is empty.
    """
    if not base or list(base) != list(tuned) or not all((*base.values(), *tuned.values())):
        raise ValueError(
            f"base has samples at {list(base)} steps, tuned at {list(tuned)}: give both the same, none empty"
        )
    rows = (("Base", "as loaded", base), ("Finetuned", "with the LoRA", tuned))
    width = 2 * _MARGIN + _LABEL + len(base) * (_CELL + _GAP) - _GAP
    grids = [(name, note, [_grid(images) for images in cells.values()]) for name, note, cells in rows]
    heights = [max(grid.height for grid in row[2]) + 2 * _PAD for row in grids]
    height = _TITLE_HEIGHT + _HEAD_HEIGHT + sum(heights) + 2 * _GAP + _LOWER + _MARGIN
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 34), title, _TEXT, _font(34))
    draw.text((_MARGIN, 80), _SUBTITLE, _FAINT, _font(18))
    _heads(draw, list(base))
    top = _TITLE_HEIGHT + _HEAD_HEIGHT
    for (name, note, cells), row_height in zip(grids, heights, strict=True):
        _row(page, draw, top, row_height, name, note, cells)
        top += row_height + _GAP
    _lower(page, draw, top, loss_plot, facts(lora_path))
    with written_whole(Path(out)) as temporary:
        page.save(temporary, format="PNG")
    return Path(out)


def compose_reflow(
    grids: Sequence[Image.Image],
    plots: Sequence[Image.Image],
    lora_path: Path,
    out: Path,
    title: str = "Reflow: the same noise, in 1, 2, 4, 8 and 25 steps",
) -> Path:
    """Writes the picture (PNG) of a reflow and returns its path.

    Args:
        grids: Diff2Flow Steps Grid's pictures before and after.
        plots: Diff2Flow Straightness's, before and after.
        lora_path: the LoRA's .safetensors file.
    """
    rows = (("Base", "CFG 3, two network", "calls a step"), ("Reflowed", "CFG 1, one network", "call a step"))
    inside = max(grid.width for grid in grids)
    side = _LOWER + 60
    width = 2 * _MARGIN + _LABEL + inside + 2 * _PAD + _GAP + side
    heights = [grid.height + 2 * _PAD for grid in grids]
    top = _TITLE_HEIGHT
    page = Image.new("RGB", (width, top + sum(heights) + _GAP + 150 + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, 34), title, _TEXT, _font(34))
    draw.text((_MARGIN, 80), _SUBTITLE, _FAINT, _font(18))
    for (name, *notes), grid, plot, height in zip(rows, grids, plots, heights, strict=True):
        draw.text((_MARGIN, top + height // 2 - 44), name, _TEXT, _font(28))
        for i, note in enumerate(notes):
            draw.text((_MARGIN, top + height // 2 - 4 + 24 * i), note, _FAINT, _font(18))
        left = _MARGIN + _LABEL
        draw.rounded_rectangle((left, top, left + inside + 2 * _PAD, top + height), 10, _CARD)
        page.paste(grid, (left + _PAD, top + _PAD))
        _card(page, draw, (left + inside + 2 * _PAD + _GAP, top, side, height), plot)
        top += height + _GAP
    for i, (name, value) in enumerate(facts(lora_path)[:8]):
        x, y = _MARGIN + (i % 2) * (width // 2), top + 16 + 34 * (i // 2)
        draw.text((x, y), name, _FAINT, _font(19))
        draw.text((x + 190, y), _shortened(draw, value, width // 2 - 240), _ACCENT if i == 0 else _TEXT, _font(19))
    with written_whole(Path(out)) as temporary:
        page.save(temporary, format="PNG")
    return Path(out)


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


def _grid(images: Sequence[Image.Image]) -> Image.Image:
    """All images of a cell in a square grid that fills the cell's width."""
    columns = math.ceil(math.sqrt(len(images)))
    inside = _CELL - 2 * _PAD
    side = (inside - (columns - 1) * 4) // columns
    lines = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (inside, lines * (side + 4) - 4), _CARD)
    for i, image in enumerate(images):
        small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        grid.paste(small, ((i % columns) * (side + 4), (i // columns) * (side + 4)))
    return grid


def _heads(draw: ImageDraw.ImageDraw, steps: Sequence[int]) -> None:
    for i, count in enumerate(steps):
        x = _MARGIN + _LABEL + i * (_CELL + _GAP) + _CELL // 2
        draw.text((x, _TITLE_HEIGHT + 8), f"{count} step{'s' * (count != 1)}", _TEXT, _font(24), anchor="ma")


def _row(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    top: int,
    height: int,
    name: str,
    note: str,
    cells: Sequence[Image.Image],
) -> None:
    draw.text((_MARGIN, top + height // 2 - 24), name, _TEXT, _font(28))
    draw.text((_MARGIN, top + height // 2 + 14), note, _FAINT, _font(18))
    for i, cell in enumerate(cells):
        left = _MARGIN + _LABEL + i * (_CELL + _GAP)
        draw.rounded_rectangle((left, top, left + _CELL, top + height), 10, _CARD)
        page.paste(cell, (left + _PAD, top + _PAD))


def _lower(
    page: Image.Image, draw: ImageDraw.ImageDraw, top: int, loss_plot: Image.Image, lines: Sequence[tuple[str, str]]
) -> None:
    """Loss curve on the left, the LoRA on the right."""
    right = page.width - _MARGIN
    middle = _MARGIN + int((right - _MARGIN) * 0.56)
    for left, end in ((_MARGIN, middle - _GAP // 2), (middle + _GAP // 2, right)):
        draw.rounded_rectangle((left, top, end, top + _LOWER), 10, _CARD)
    draw.text((_MARGIN + 24, top + 18), "Loss while finetuning", _TEXT, _font(24))
    plot = loss_plot.convert("RGB")
    room = (middle - _GAP // 2 - _MARGIN - 48, _LOWER - 76)
    scale = min(room[0] / plot.width, room[1] / plot.height)
    plot = plot.resize((max(1, int(plot.width * scale)), max(1, int(plot.height * scale))), Image.Resampling.LANCZOS)
    page.paste(plot, (_MARGIN + 24 + (room[0] - plot.width) // 2, top + 60))
    left = middle + _GAP // 2 + 24
    draw.text((left, top + 18), "The LoRA", _TEXT, _font(24))
    for i, (name, value) in enumerate(lines[:10]):
        y = top + 66 + i * 35
        draw.text((left, y), name, _FAINT, _font(19))
        draw.text((left + 190, y), _shortened(draw, value, right - left - 214), _ACCENT if i == 0 else _TEXT, _font(19))


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
