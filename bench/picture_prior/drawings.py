"""The four sets of drawings as pixels: SVG and WebP, drawn on white at 128 x 128."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import packages

SIZE = 128
"""Pixels of a drawing's side."""
_PRESENTATION = "fe0f"
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {w} {h}">'
    "{body}</svg>"
)

Drawing = tuple[str, Callable[[], np.ndarray]]
"""(hexcode, draws it as uint8 (128, 128, 3))."""


def code(text: str) -> str:
    """A hexcode as all sets are compared by: small letters, without the emoji presentation mark."""
    return "-".join(part for part in text.lower().split("-") if part != _PRESENTATION)


def noto(folder: Path) -> Iterator[Drawing]:
    """Google's Noto Emoji."""
    return _icons(packages.NOTO.archive(folder))


def twemoji(folder: Path) -> Iterator[Drawing]:
    """Twitter's Twemoji."""
    return _icons(packages.TWEMOJI.archive(folder))


def fluent(folder: Path) -> Iterator[Drawing]:
    """Microsoft's Fluent Emoji, the three-dimensional ones."""
    for name, content in packages.members(packages.FLUENT.archive(folder), "assets/", ".webp"):
        yield code(name), partial(_flat, content)


def openmoji(folder: Path) -> Iterator[Drawing]:
    """OpenMoji, in colour."""
    for name, content in packages.members(packages.OPENMOJI.archive(folder), "color/svg/", ".svg"):
        yield code(name), partial(_drawn, content.decode())


def _icons(archive: Path) -> Iterator[Drawing]:
    icons, names = packages.read_json(archive, "icons.json"), packages.read_json(archive, "chars.json")
    for hexcode, name in names.items():
        icon = icons["icons"].get(name)
        if icon is None:  # an alias of a drawing that another hexcode has
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        yield code(hexcode), partial(_drawn, _SVG.format(w=width, h=height, body=icon["body"]))


def _drawn(svg: str) -> np.ndarray:
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise RuntimeError("SVG is drawn with the package resvg_py: install it with 'pip install resvg_py'") from error
    return _flat(bytes(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)))


def _flat(content: bytes) -> np.ndarray:
    """An image file with transparency, on white."""
    from PIL import Image

    image = Image.open(io.BytesIO(content)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
