"""Images from and to files, as ComfyUI's LoadImage and SaveImage read and write them."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...files import TooLargeError, confined, written_whole
from ...training.images import opened_image
from ..port import HostError

_NO_MASK = (1, 64, 64)


def load_image(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE (B, H, W, 3) in [0, 1] and MASK (B, H, W) = 1 - transparency; all frames of the first one's size.

    Raises:
        HostError: the file is no image, a truncated one, or declares more pixels than are read.
    """
    try:
        with opened_image(path) as file:
            frames = [ImageOps.exif_transpose(frame) for frame in ImageSequence.Iterator(file)]
            several = file.format != "MPO"
            kept = [frame for frame in frames if frame.size == frames[0].size] if several else frames[:1]
            images, masks = [_pixels(frame) for frame in kept], [_mask(frame) for frame in kept]
    except TooLargeError as error:
        raise HostError(str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise HostError(
            f"'{path}' cannot be read as an image ({error}); give a whole PNG, JPEG or WebP file"
        ) from error
    return torch.cat(images), torch.cat(masks)


def _pixels(frame: Image.Image) -> Tensor:
    if frame.mode == "I":
        frame = frame.point(lambda value: value * (1 / 255))
    return torch.from_numpy(np.array(frame.convert("RGB")).astype(np.float32) / 255.0)[None]


def _mask(frame: Image.Image) -> Tensor:
    if "A" in frame.getbands():
        alpha = frame.getchannel("A")
    elif frame.mode == "P" and "transparency" in frame.info:
        alpha = frame.convert("RGBA").getchannel("A")
    else:
        return torch.zeros(_NO_MASK)
    return 1.0 - torch.from_numpy(np.array(alpha).astype(np.float32) / 255.0)[None]


def save_images(
    images: Tensor,
    folder: Path,
    prefix: str,
    kind: str,
    prompt: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> list[dict[str, str]]:
    """Saves IMAGE (B, H, W, C) as PNG files `<prefix>_00001_.png`, counting on from those that are there.

    Args:
        prefix: may have subfolders, and %year%, %month%, %day%, %hour%, %minute%, %second%, %width%, %height%,
            %batch_num%.
        kind: "output" or "temp", for the entries returned.
        prompt, extra: written as JSON into the PNG's text chunks, "prompt" and the keys of `extra`.

    Returns:
        ComfyUI's entries {"filename", "subfolder", "type"}.

    Raises:
        ValueError: the prefix leads out of the folder.
    """
    start = confined(folder, os.path.normpath(_filled(prefix, images.shape[2], images.shape[1])).replace("\\", "/"))
    counter, chunks = _next_number(start), _text_chunks(prompt, extra)
    subfolder = start.parent.relative_to(folder).as_posix().removeprefix(".")
    saved = []
    for number, image in enumerate(images):
        name = f"{start.name.replace('%batch_num%', str(number))}_{counter + number:05}_.png"
        with written_whole(start.parent / name) as path:
            _picture(image, number).save(path, format="PNG", pnginfo=chunks, compress_level=4)
        saved.append({"filename": name, "subfolder": subfolder, "type": kind})
    return saved


def temporary_prefix() -> str:
    """A prefix for previews that no other run has."""
    return "ComfyUI_temp_" + "".join(random.SystemRandom().choices("abcdefghijklmnopqrstuvwxyz", k=5))


def _picture(image: Tensor, number: int) -> Image.Image:
    """An image (H, W, C) in 8 bits, rounded down as ComfyUI does."""
    pixels = (255.0 * image.float().cpu().numpy()).clip(0, 255)
    if np.isnan(pixels).any():
        raise ValueError(
            f"image {number} of the batch holds NaN; nothing was saved for it, look at the node that made it"
        )
    return Image.fromarray(pixels.astype(np.uint8))


def _filled(prefix: str, width: int, height: int) -> str:
    now = time.localtime()
    values = {"width": width, "height": height, "year": now.tm_year}
    parts = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    values |= {name: f"{value:02}" for name, value in parts.items()}
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    return prefix


def _next_number(start: Path) -> int:
    """One more than the largest number of a file `<start>_<number>_...` there is."""
    largest = 0
    for path in start.parent.glob("*") if start.parent.is_dir() else ():
        if path.name.lower().startswith(f"{start.name}_".lower()):
            digits = path.name[len(start.name) + 1 :].split("_")[0]
            largest = max(largest, int(digits) if digits.isdigit() else 0)
    return largest + 1


def _text_chunks(prompt: Mapping[str, Any] | None, extra: Mapping[str, Any] | None) -> PngInfo:
    chunks = PngInfo()
    if prompt is not None:
        chunks.add_text("prompt", json.dumps(prompt))
    for name, value in (extra or {}).items():
        chunks.add_text(name, json.dumps(value))
    return chunks
