"""The dataset of a folder of images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from .buckets import Sizes
from .choices import ALPHAS
from .dataset import LatentDataset
from .encoding import Cache, Encoders, Job, MakeProgress, bar, placed_item, reason_of, require_floor, unreadable
from .folders import Picture, find_pictures, unread_folders, unread_pictures
from .images import (
    ImageFacts,
    content_key,
    image_facts,
    is_facts,
    is_key,
    named,
    read_alpha,
    read_image,
    read_mask,
)
from .records import Records

_LOG = logging.getLogger(__name__)
_SHOW_FROM = 256
"""New files from which on looking at them has a progress bar of its own."""


@dataclass(frozen=True)
class FolderSettings:
    """How a folder is made into a dataset.

    Args:
        sizes: that images are brought to.
        trigger, default_caption: see `find_pictures`.
        flips: encodes mirrored images, too.
        alpha: "white" lays transparency on white; "mask" makes it, or a mask file, a weight of the loss as well.
        mask_floor: weight of what masks leave out, from 0 to 1.
        weighted: whether brackets in captions weigh words, as in prompts.

    Raises:
        ValueError: a value out of its range.
    """

    sizes: Sizes
    trigger: str = ""
    default_caption: str = ""
    flips: bool = False
    alpha: str = "white"
    mask_floor: float = 0.0
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.alpha not in ALPHAS:
            raise ValueError(f"alpha must be one of {', '.join(ALPHAS)}, not {self.alpha!r}")
        require_floor(self.mask_floor)


def image_dataset(
    folder: Path, cache: Path, settings: FolderSettings, encoders: Encoders, progress: MakeProgress
) -> LatentDataset:
    """The dataset of a folder, encoding only what the cache does not hold.

    Args:
        folder: images with captions, see `find_pictures`.
        cache: a folder for the encoded tensors; what is done stays there if this is interrupted.
        settings: sizes, captions, flips and masks.
        encoders: VAE and text encoder.
        progress: makes the bar for a total.

    Raises:
        ValueError: see `find_pictures`; no image that can be read; an encoding that is not finite.
    """
    pictures = find_pictures(folder, settings.trigger, settings.default_caption)
    defaulted = tuple(picture.name for picture in pictures if picture.defaulted)
    if defaulted:
        _LOG.warning("%d images have no caption and are given the default: %s", len(defaulted), named(list(defaulted)))
    notes = _notes(folder, pictures, settings)
    files = _Files(Records(cache / "files.json"))
    skipped = files.look(pictures, settings, progress)
    jobs = [job for picture in pictures if picture.name not in skipped for job in files.jobs(picture, settings)]
    dataset = Cache(cache, encoders).dataset(folder.name, jobs, progress)
    skipped |= dataset.skipped
    if not dataset.items:
        raise ValueError(unreadable(f"folder '{folder.name}'", skipped))
    resolution = max(settings.sizes.resolutions)
    return replace(dataset, skipped=skipped, defaulted=defaulted, notes=notes, resolution=resolution)


class _Files:
    """What is known of a folder's files, looked at once and recorded."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._facts: dict[str, ImageFacts] = {}
        self._masks: dict[str, str] = {}

    def look(self, pictures: Sequence[Picture], settings: FolderSettings, progress: MakeProgress) -> dict[str, str]:
        """Looks at every image and mask file; the images that cannot be read, with the reason."""
        new = sum(not self._records.holds(picture.path, picture.name) for picture in pictures)
        skipped: dict[str, str] = {}
        try:
            with bar(progress, new if new >= _SHOW_FROM else 0) as advance:
                for picture in pictures:
                    known = self._records.holds(picture.path, picture.name)
                    if reason := self._look_at(picture, settings.alpha == "mask"):
                        skipped[picture.name] = reason
                        _LOG.warning("The image %s cannot be read and is skipped: %s", picture.path, reason)
                    if not known:
                        advance(picture.name)
        finally:
            self._records.save()
        return skipped

    def jobs(self, picture: Picture, settings: FolderSettings) -> list[Job]:
        """The jobs of an image, one for each size."""
        facts, mask = self._facts[picture.name], ""
        if settings.alpha == "mask":
            mask = self._masks.get(picture.name, f"{facts.content}-alpha" if facts.transparent else "")
        return [_job(picture, facts, mask, size, settings) for size in settings.sizes.of(facts.width, facts.height)]

    def _look_at(self, picture: Picture, masks: bool) -> str:
        try:
            found = self._records.of(picture.path, picture.name, lambda path: asdict(image_facts(path)), is_facts)
            self._facts[picture.name] = ImageFacts(**found)
            if masks and picture.mask is not None:
                key = self._records.of(picture.mask, f"{picture.name}/mask", content_key, is_key)
                self._masks[picture.name] = f"{key}-grey"
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for broken files
            return reason_of(error)
        return ""


def _job(picture: Picture, facts: ImageFacts, mask: str, size: tuple[int, int], settings: FolderSettings) -> Job:
    original = (facts.width, facts.height)
    item = placed_item(picture.name, picture.caption, facts.content, original, size, settings.flips, mask)
    more = {"mask_floor": settings.mask_floor, "weighted": settings.weighted}
    item = replace(item, repeats=picture.repeats, source=picture.source, **more)
    if picture.mask is not None:
        read = partial(read_mask, picture.mask, *size, original)
    else:
        read = partial(read_alpha, picture.path, *size)
    return Job(item, partial(read_image, picture.path, *size), read if mask else None)


def _notes(folder: Path, pictures: Sequence[Picture], settings: FolderSettings) -> tuple[str, ...]:
    """What was found and not used, a line each; logged, too."""
    notes = []
    if others := unread_folders(folder):
        notes.append(f"{len(others)} subfolders not read (only N_name is, as in 10_ink): {named(others)}")
    if unread := unread_pictures(folder):
        notes.append(
            f"{len(unread)} pictures are of a format that is not read and left out; save them as PNG or JPEG:"
            f" {named(unread)}"
        )
    masked = [picture.name for picture in pictures if picture.mask is not None]
    if masked and settings.alpha != "mask":
        notes.append(f"{len(masked)} images have a mask file that is not used, as alpha is 'white': {named(masked)}")
    for note in notes:
        _LOG.warning("%s: %s", folder.name, note)
    return tuple(notes)
