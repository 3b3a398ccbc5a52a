"""A folder of images with captions, and kohya's folders of repeats in it: what is there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import read_text
from .images import EXTENSIONS, is_image, is_unread_picture, named

CAPTIONS = (".txt", ".caption")
"""Where a caption is looked for, in this order."""
_REPEATED = re.compile(r"0*([1-9]\d{0,5})_(.+)")
_MASK_NAMES = ("{}.mask.png", "{}-masklabel.png")


@dataclass(frozen=True)
class Picture:
    """An image file and its caption, trigger included.

    Args:
        path: of the file.
        name: its path inside the dataset's folder, with "/".
        caption: one line.
        defaulted: whether it had no caption file.
        source: name of the folder that it is in.
        repeats: how often it counts in an epoch.
        mask: the mask file beside it, if any.
    """

    path: Path
    name: str
    caption: str
    defaulted: bool
    source: str
    repeats: int
    mask: Path | None


@dataclass(frozen=True)
class _Source:
    """A folder whose images are read: its repeats, and the caption that its name gives ("" if none)."""

    path: Path
    prefix: str
    repeats: int
    caption: str


def find_pictures(folder: Path, trigger: str = "", default_caption: str = "") -> list[Picture]:
    """The images in a folder and in its N_name subfolders, sorted by name, each with the caption beside it.

    The caption of ink.png is in ink.txt or ink.caption. N_name (for the folder itself as well) means N repeats, and
    the caption "name" where an image has none and there is no default. ink.mask.png and ink-masklabel.png beside it
    are its mask, no image.

    Args:
        folder: to look in; other subfolders are not read, see `unread_folders`.
        trigger: put in front of every caption, with a comma between.
        default_caption: for images without a caption file; "" makes them an error outside of N_name folders. An empty
            caption file is an empty caption.

    Raises:
        ValueError: no image in the folder, a caption missing and no default, or a caption that is not UTF-8.
    """
    pictures, missing = [], []
    for source in _sources(folder):
        default = default_caption if default_caption.strip() else source.caption
        for file, mask in _images(source.path).items():
            caption, name = _caption_of(file), source.prefix + file.name
            if caption is None and not default.strip():
                missing.append(name)
            line = _one_line(trigger, default if caption is None else caption)
            pictures.append(Picture(file, name, line, caption is None, source.path.name, source.repeats, mask))
    if not pictures:
        raise ValueError(_no_images(folder))
    if missing:
        raise ValueError(
            f"default_caption is empty and {len(missing)} of the {len(pictures)} images in '{folder.name}' have no"
            f" caption ({named(missing)}): write a .txt of the same name beside each (it may be empty), or set"
            " default_caption"
        )
    return pictures


def unread_folders(folder: Path) -> list[str]:
    """Names of the subfolders that hold images but are no N_name folders."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path.name for path in below if not _REPEATED.fullmatch(path.name) and any(_image_files(path))]


def unread_pictures(folder: Path) -> list[str]:
    """Names of the pictures beside those that `find_pictures` finds whose format is not read."""
    return [
        source.prefix + file.name
        for source in _sources(folder)
        for file in sorted(source.path.iterdir())
        if is_unread_picture(file) and not file.name.startswith(".")
    ]


def folder_state(folder: Path) -> str:
    """Digest of the names, sizes and times of what `find_pictures` reads, and of pictures that nothing here reads."""
    states = []
    for source in _sources(folder):
        for file in sorted(source.path.iterdir()):
            if is_image(file) or is_unread_picture(file) or file.suffix.lower() in CAPTIONS:
                states.append((source.prefix + file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _sources(folder: Path) -> list[_Source]:
    own = _REPEATED.fullmatch(folder.name)
    sources = [_Source(folder, "", *((int(own[1]), own[2]) if own else (1, "")))]
    for path in sorted(folder.iterdir()):
        found = _REPEATED.fullmatch(path.name)
        if found and path.is_dir():
            sources.append(_Source(path, f"{path.name}/", int(found[1]), found[2]))
    return sources


def _images(folder: Path) -> dict[Path, Path | None]:
    """The image files directly in a folder, each with its mask file; mask files of images are no images."""
    files = sorted(_image_files(folder))
    there = {file.name: file for file in files}
    masks = {file: _mask_of(file, there) for file in files}
    taken = {mask for mask in masks.values() if mask is not None}
    return {file: mask for file, mask in masks.items() if file not in taken}


def _mask_of(file: Path, there: dict[str, Path]) -> Path | None:
    names = (pattern.format(file.stem) for pattern in _MASK_NAMES)
    return next((there[name] for name in names if name in there), None)


def _image_files(folder: Path) -> Iterator[Path]:
    return (f for f in folder.iterdir() if is_image(f) and not f.name.startswith("."))


def _caption_of(file: Path) -> str | None:
    text = next((path for path in map(file.with_suffix, CAPTIONS) if path.exists()), None)
    if text is None:
        return None
    try:
        return read_text(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption '{text.name}' is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _one_line(trigger: str, caption: str) -> str:
    parts = [" ".join(part.split()) for part in (trigger, caption)]
    return ", ".join(part for part in parts if part)


def _no_images(folder: Path) -> str:
    below = unread_folders(folder)
    hint = f"; subfolders are not read, but {named(below)} holds some: give that folder" if below else ""
    if unread := unread_pictures(folder):
        hint += f"; {len(unread)} pictures are of a format that is not read ({named(unread)})"
    return f"folder '{folder.name}' holds no image ({', '.join(e[1:] for e in EXTENSIONS)}){hint}: put images into it"
