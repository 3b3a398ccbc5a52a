"""One image file: what it is, as a tensor, and its mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import PICTURES, TooLargeError, require_size, sha256_of
from .buckets import Size, cover

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""What is read always; of a GIF its first frame."""
_WITH_PLUGIN = (".avif", ".heic", ".heif", ".jxl")
"""What is read where this Pillow, or a plugin that registered itself, reads it."""
_BRIGHTEST_OF_ONE, _DARKEST_OF_255 = 1.0, 16.0
_NAMED_AT_MOST = 5
_TRANSPARENT_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image without its pixels.

    Args:
        content: digest of the file's bytes.
        width, height: pixels, turned as its EXIF says.
        transparent: whether it has an alpha channel.
    """

    content: str
    width: int
    height: int
    transparent: bool


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """A picture whose size was checked and whose pixels are not read yet.

    Raises:
        TooLargeError: it declares more pixels than are read.
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"'{path.name}' declares more pixels than are read ({error}); scale it down") from error
    with image:
        require_size(path.name, image.size[::-1])
        yield image


def is_image(path: Path) -> bool:
    """Whether a file is a picture of a format that is read here, by its extension."""
    extension = path.suffix.lower()
    return extension in EXTENSIONS or (extension in _WITH_PLUGIN and extension in Image.registered_extensions())


def is_unread_picture(path: Path) -> bool:
    """Whether a file is a picture of a format that is not read here, by its extension."""
    return path.suffix.lower() in PICTURES and not is_image(path)


def is_facts(found: object) -> bool:
    """Whether a JSON value is an `ImageFacts` as a dictionary."""
    kinds = {"content": str, "width": int, "height": int, "transparent": bool}
    return isinstance(found, dict) and {key: type(value) for key, value in found.items()} == kinds


def is_key(found: object) -> bool:
    """Whether a JSON value is a `content_key`."""
    return isinstance(found, str)


def image_facts(path: Path) -> ImageFacts:
    """Looks at an image file; raises whatever Pillow raises for one that it cannot read."""
    with opened_image(path) as image:
        size = image.size
        if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # the EXIF orientations that lie on their side
            size = size[::-1]
        return ImageFacts(content_key(path), *size, _is_transparent(image))


def read_image(path: Path, width: int, height: int) -> Tensor:
    """IMAGE (1, height, width, 3) float32 in [0, 1]: turned as its EXIF says, scaled to cover, cropped in the middle.

    Transparency is laid on white. 16-bit grey is scaled, not clipped; floating point grey from 0 to 1 or to 255, too.

    Raises:
        ValueError: grey numbers whose white cannot be told.
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    with opened_image(path) as opened:
        image = _rgb(ImageOps.exif_transpose(opened))
    return _tensor(placed(image, (width, height), Image.Resampling.LANCZOS))


def read_alpha(path: Path, width: int, height: int) -> Tensor:
    """MASK (1, height, width) float32 in [0, 1]: an image's alpha channel (1 = opaque), placed as `read_image`."""
    with opened_image(path) as opened:
        alpha = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
    return _tensor(placed(alpha, (width, height), Image.Resampling.BOX))


def read_mask(path: Path, width: int, height: int, original: Size) -> Tensor:
    """MASK (1, height, width) float32 in [0, 1] of a grey mask file (white = 1), placed as its image.

    Raises:
        ValueError: its size is not `original`, that of its image.
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    with opened_image(path) as opened:
        grey = _rgb(ImageOps.exif_transpose(opened)).convert("L")
    if grey.size != original:
        raise ValueError(
            f"its mask '{path.name}' is {grey.width}×{grey.height} px, not {original[0]}×{original[1]} like the image"
        )
    return _tensor(placed(grey, (width, height), Image.Resampling.BOX))


def placed(image: Image.Image, target: Size, resampling: Image.Resampling) -> Image.Image:
    """Scaled to cover the target and cropped as `cover` says, in one go: a long strip is never scaled as a whole.

    Args:
        image: of any mode that Pillow resizes.
        target: (width, height) pixels.
        resampling: NEAREST for what must not be mixed, as depth.
    """
    place = cover(image.size, target)
    x, y = image.width / place.width, image.height / place.height
    box = (place.left * x, place.top * y, (place.left + target[0]) * x, (place.top + target[1]) * y)
    within = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))  # rounding may end a hair outside
    return image.resize(target, resampling, within)


def content_key(path: Path) -> str:
    """Digest of a file's bytes."""
    return sha256_of(path)[:32]


def named(names: list[str]) -> str:
    """ "a, b, c and 7 more"."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255.0).unsqueeze(0)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _TRANSPARENT_MODES or "transparency" in image.info


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey(image).round().clip(0, 255).astype(numpy.uint8))
    if _is_transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey(image: Image.Image) -> numpy.ndarray:
    """Grey (H, W) from 0 to 255 of a picture with more than 8 bits.

    Raises:
        ValueError: its numbers are neither 16-bit whole ones nor from 0 to 1 or to 255.
    """
    grey = numpy.asarray(image, dtype=numpy.float32)
    low, high = float(grey.min()), float(grey.max())
    if image.mode != "F":
        if 0 <= low and high <= 65535:
            return grey / 257.0
    elif 0 <= low and high <= _BRIGHTEST_OF_ONE:
        return grey * 255.0
    elif 0 <= low and _DARKEST_OF_255 <= high <= 255:
        return grey
    raise ValueError(
        f"its grey values go from {low:g} to {high:g}, so what is white cannot be told; save it with 8 or 16 bits, or as"
        " floating point numbers from 0 to 1"
    )
