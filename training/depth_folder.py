"""The dataset of a folder of images with their depth."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from ..depth.choices import LAYOUTS
from ..depth.codec import encode, latent_mask
from ..depth.layouts import Found, Pair, find_pairs, load_pair
from .buckets import Size, Sizes
from .dataset import Item, LatentDataset
from .encoding import Cache, Encoders, Job, MakeProgress, bar, placed_item, reason_of, unreadable
from .images import ImageFacts, content_key, image_facts, is_facts, is_key, named, placed, read_image
from .records import Records

_LOG = logging.getLogger(__name__)
_LATENT = 8
"""Pixels of a latent's side."""
_FORMAT = 1
"""Part of the keys of depth latents: raise it when the codec changes."""


@dataclass(frozen=True)
class DepthSettings:
    """How a folder of images and depth is made into a dataset.

    Args:
        sizes: that images and depth are brought to, without changing their shape: scaled alike and cropped.
        layout: of `depth.choices.LAYOUTS`.
        unit: of the depth files in layout folders, of `depth.choices.UNITS`.
        limit: metres from which on depth is not valid; 0: none but the layout's own.
        flips: encodes mirrored pairs, too.

    Raises:
        ValueError: a value out of its range.
    """

    sizes: Sizes
    layout: str = "auto"
    unit: str = "auto"
    limit: float = 0.0
    flips: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        if not 0.0 <= self.limit < float("inf"):
            raise ValueError(f"max_depth must be at least 0 metres, not {self.limit}; 0 sets no limit")


def depth_dataset(
    folder: Path, cache: Path, settings: DepthSettings, encoders: Encoders, progress: MakeProgress
) -> LatentDataset:
    """The dataset of a folder: depth as the latent, the image as what the network looks at, null text as the caption.

    Args:
        folder: see `depth.layouts.find_pairs`.
        cache: a folder for the encoded tensors; what is done stays there if this is interrupted.
        settings: sizes, layout, unit, limit and flips.
        encoders: VAE and text encoder.
        progress: makes the bar for a total.

    Raises:
        ValueError: see `find_pairs`; no pair that can be used; an encoding that is not finite.
    """
    found = find_pairs(folder, settings.layout)
    keys, skipped = _looked_at(found.pairs, Records(cache / "depth_files.json"), progress)
    jobs = [
        _job(pair, *keys[pair.name], size, settings)
        for pair in found.pairs
        if pair.name in keys
        for size in settings.sizes.of(keys[pair.name][0].width, keys[pair.name][0].height)
    ]
    dataset = Cache(cache, encoders).dataset(folder.name, jobs, progress)
    skipped |= dataset.skipped
    if not dataset.items:
        raise ValueError(unreadable(f"folder '{folder.name}'", skipped))
    notes = _notes(found, folder.name)
    return replace(dataset, skipped=skipped, notes=notes, resolution=max(settings.sizes.resolutions))


def _looked_at(
    pairs: Sequence[Pair], records: Records, progress: MakeProgress
) -> tuple[dict[str, tuple[ImageFacts, str]], dict[str, str]]:
    """What is known of each pair's image, and its depth's digest; the pairs that cannot be read, with the reason."""
    known: dict[str, tuple[ImageFacts, str]] = {}
    skipped: dict[str, str] = {}
    try:
        with bar(progress, len(pairs)) as advance:
            for pair in pairs:
                try:
                    facts = records.of(pair.image, pair.name, lambda path: asdict(image_facts(path)), is_facts)
                    depth = records.of(pair.depth, f"{pair.name}/depth", content_key, is_key)
                    known[pair.name] = (ImageFacts(**facts), depth)
                except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
                    skipped[pair.name] = reason_of(error)
                    _LOG.warning("The image %s cannot be read and is skipped: %s", pair.image, skipped[pair.name])
                advance(pair.name)
    finally:
        records.save()
    return known, skipped


def _job(pair: Pair, facts: ImageFacts, depth: str, size: Size, settings: DepthSettings) -> Job:
    read = partial(_depth_of, pair, size, (facts.width, facts.height), settings.unit, settings.limit)
    made_of = (_FORMAT, depth, facts.content, pair.convention, settings.unit, settings.limit)
    content = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    item = placed_item(pair.name, "", content, (facts.width, facts.height), size, settings.flips, content)
    return Job(
        _seeing(item, f"{facts.content}-{size[0]}x{size[1]}"),
        lambda: read()[0],
        lambda: read()[1],
        partial(read_image, pair.image, *size),
    )


def _seeing(item: Item, image: str) -> Item:
    return replace(item, image=image, flipped_image=f"{image}-mirrored" if item.flipped else "")


@lru_cache(maxsize=1)
def _depth_of(pair: Pair, size: Size, original: Size, unit: str, limit: float) -> tuple[Tensor, Tensor]:
    """Depth as an IMAGE (1, H, W, 3) in [0, 1], near 0; MASK (1, H, W), 1 where all of a latent's pixels are valid.

    Raises:
        ValueError: another size than the image's, or too little that is valid.
    """
    depth, valid = load_pair(pair, unit)
    if tuple(depth.shape) != (original[1], original[0]):
        raise ValueError(
            f"its depth is {depth.shape[1]}×{depth.shape[0]} px, the image {original[0]}×{original[1]}; give depth of"
            " the image's size"
        )
    if limit:
        valid = valid & (depth < limit)
    depth, valid = (_nearest(part, size)[None] for part in (torch.where(valid, depth, 0.0), valid))
    if not valid.any():
        raise ValueError("none of its depth is valid (finite, above 0 and below max_depth)")
    mask = latent_mask(valid, _LATENT)
    if not mask.any():
        raise ValueError(f"no square of {_LATENT}×{_LATENT} pixels of its depth is valid throughout")
    picture = (encode(depth, valid).picture + 1.0) / 2.0
    return picture, mask[:, 0].repeat_interleave(_LATENT, 1).repeat_interleave(_LATENT, 2)


def _nearest(values: Tensor, size: Size) -> Tensor:
    """(height, width) of values (H, W), placed as the image is, none mixed with its neighbours."""
    image = Image.fromarray(values.float().numpy())
    moved = torch.from_numpy(numpy.asarray(placed(image, size, Image.Resampling.NEAREST)).copy())
    return moved if values.dtype != torch.bool else moved > 0


def _notes(found: Found, folder: str) -> tuple[str, ...]:
    notes = []
    if found.unpaired:
        notes.append(f"{len(found.unpaired)} files without their other half are not used: {named(found.unpaired)}")
    if found.unread:
        notes.append(
            f"{len(found.unread)} files are of a format that is not read there and left out; save images as PNG or"
            f" JPEG, and depth as EXR, NPY or 16-bit PNG: {named(found.unread)}"
        )
    for note in notes:
        _LOG.warning("%s: %s", folder, note)
    return tuple(notes)
