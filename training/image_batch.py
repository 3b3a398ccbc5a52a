"""The dataset of an IMAGE batch straight from a graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from .dataset import LatentDataset
from .encoding import Cache, Encoders, Job, MakeProgress, placed_item, require_floor


@dataclass(frozen=True)
class BatchSettings:
    """How a batch is made into a dataset.

    Args:
        name: of the dataset.
        repeats: how often each image counts in an epoch, at least 1.
        flips: encodes mirrored images, too.
        mask_floor: weight of what masks leave out, from 0 to 1.
        weighted: whether brackets in captions weigh words, as in prompts.

    Raises:
        ValueError: a value out of its range.
    """

    name: str
    repeats: int = 1
    flips: bool = False
    mask_floor: float = 0.0
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")
        require_floor(self.mask_floor)


def batch_dataset(
    images: Tensor,
    captions: str,
    mask: Tensor | None,
    cache: Path,
    settings: BatchSettings,
    encoders: Encoders,
    progress: MakeProgress,
) -> LatentDataset:
    """The dataset of a batch, encoding only what the cache does not hold; images are told apart by their pixels.

    Args:
        images: IMAGE (B, H, W, 3 or more) in [0, 1], H and W multiples of 8; channels after the third are not used.
        captions: a line for each image, or one for all; an empty line is an empty caption.
        mask: MASK (B, H, W) or (1, H, W) in [0, 1], 1 where the loss counts; or None.
        cache: a folder for the encoded tensors.
        settings: name, repeats, flips and the mask's floor.
        encoders: VAE and text encoder.
        progress: makes the bar for a total.

    Raises:
        ValueError: a size that is no multiple of 8, another number of captions, a mask of another size or number.
    """
    count, height, width = images.shape[:3]
    if height % 8 or width % 8:
        raise ValueError(
            f"images: they are {width}×{height} px, but sides must be multiples of 8 px; scale or crop them to"
            f" {max(8, width // 8 * 8)}×{max(8, height // 8 * 8)} first"
        )
    lines = _lines(captions, count)
    masks = None if mask is None else _masks(mask, images)
    jobs = [_job(i, images, lines[i], masks, settings) for i in range(count)]
    return Cache(cache, encoders).dataset(settings.name, jobs, progress)


def _job(i: int, images: Tensor, caption: str, masks: Tensor | None, settings: BatchSettings) -> Job:
    image = images[i : i + 1, :, :, :3]
    size = (image.shape[2], image.shape[1])
    mask = None if masks is None else masks[i : i + 1]
    name = f"image {i + 1}"
    item = placed_item(name, caption, _digest(image), size, size, settings.flips, "" if mask is None else _digest(mask))
    more = {"mask_floor": settings.mask_floor, "weighted": settings.weighted}
    item = replace(item, repeats=settings.repeats, source=settings.name, **more)
    return Job(item, partial(_same, image), None if mask is None else partial(_same, mask))


def _lines(captions: str, count: int) -> list[str]:
    lines = [" ".join(line.split()) for line in captions.rstrip("\r\n").split("\n")]
    if len(lines) == 1:
        return lines * count
    if len(lines) != count:
        raise ValueError(
            f"captions: it has {len(lines)} lines for {count} images; give one line for each image, in their order, or"
            " one line for all"
        )
    return lines


def _masks(mask: Tensor, images: Tensor) -> Tensor:
    mask = mask if mask.ndim == 3 else mask.unsqueeze(0)
    count, height, width = images.shape[:3]
    if tuple(mask.shape[1:]) != (height, width) or len(mask) not in (1, count):
        raise ValueError(
            f"mask: it has {len(mask)} masks of {mask.shape[2]}×{mask.shape[1]} px for {count} images of"
            f" {width}×{height} px; give one of that size for each image or one for all (Load Image makes an empty one"
            " of 64×64 px where the picture has no transparency: leave the input open then)"
        )
    return mask.clamp(0, 1).expand(count, -1, -1)


def _digest(tensor: Tensor) -> str:
    pixels = tensor.detach().float().cpu().contiguous()
    sha = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    sha.update(pixels.numpy().tobytes())
    return sha.hexdigest()[:32]


def _same(tensor: Tensor) -> Tensor:
    return tensor
