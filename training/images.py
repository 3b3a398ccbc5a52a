"""A folder of images with captions: what is in it, and one image as a tensor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import sha256_of

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Picture:
    """An image file and its caption, trigger included; `defaulted` where it had none of its own."""

    path: Path
    caption: str
    defaulted: bool


def find_pictures(folder: Path, trigger: str = "", default_caption: str = "") -> list[Picture]:
    """The images directly in a folder, sorted by name, each with the caption from the .txt beside it.

    Args:
        folder: to look in; subfolders are not read.
        trigger: put in front of every caption, with a comma between.
        default_caption: for images without a .txt; "" makes them an error. An empty .txt is an empty caption.

    Raises:
        ValueError: no image in the folder, a caption missing and no default, or a caption that is not UTF-8.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and not f.name.startswith("."))
    if not files:
        raise ValueError(_no_images(folder))
    captions = {file: _caption_of(file) for file in files}
    missing = [file.name for file, caption in captions.items() if caption is None]
    if missing and not default_caption.strip():
        raise ValueError(
            f"default_caption is empty and {len(missing)} of the {len(files)} images in '{folder.name}' have no caption"
            f" ({named(missing)}): write a .txt of the same name beside each (it may be empty), or set default_caption"
        )
    return [
        Picture(file, _one_line(trigger, default_caption if caption is None else caption), caption is None)
        for file, caption in captions.items()
    ]


def read_image(path: Path, width: int, height: int) -> Tensor:
    """IMAGE (1, height, width, 3) float32 in [0, 1]: turned as its EXIF says, scaled to cover, cropped in the middle.

    Transparency is laid on white. 16-bit grey is scaled, not clipped.

    Raises:
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    with Image.open(path) as opened:
        image = _rgb(ImageOps.exif_transpose(opened))
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255.0).unsqueeze(0)


def folder_state(folder: Path) -> str:
    """Digest of the names, sizes and times of the images and captions in a folder; changes when one of them does."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (*EXTENSIONS, ".txt"))
    states = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def content_key(path: Path) -> str:
    """Digest of a file's bytes."""
    return sha256_of(path)[:32]


def named(names: list[str]) -> str:
    """ "a, b, c and 7 more"."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _caption_of(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    if not text.exists():
        return None
    try:
        return text.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption '{text.name}' is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _one_line(trigger: str, caption: str) -> str:
    parts = [" ".join(part.split()) for part in (trigger, caption)]
    return ", ".join(part for part in parts if part)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = numpy.asarray(image, dtype=numpy.float32) / 257.0
        image = Image.fromarray(grey.round().clip(0, 255).astype(numpy.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _no_images(folder: Path) -> str:
    below = sorted({f.parent.name for f in folder.glob("*/*") if f.suffix.lower() in EXTENSIONS})
    hint = f"; subfolders are not read, but {named(below)} holds some: give that folder" if below else ""
    return f"folder '{folder.name}' holds no image ({', '.join(e[1:] for e in EXTENSIONS)}){hint}: put images into it"
