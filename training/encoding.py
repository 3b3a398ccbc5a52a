"""A folder of images made into a dataset: everything encoded once, and what is done never done again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dataset import Item, LatentDataset, context_key, pooled_key
from .images import Picture, content_key, find_pictures, named, read_image
from .port import Progress
from .shards import ShardStore

_LOG = logging.getLogger(__name__)
_FORMAT = 1
"""Part of every cache key: raise it when what is cached changes its meaning."""

ImageEncoder = Callable[[Tensor], Tensor]
"""IMAGE (1, H, W, 3) in [0, 1] -> latent (1, C, h, w) in the autoencoder's scale."""
TextEncoder = Callable[[str], "tuple[Tensor, Tensor | None]"]
"""Caption -> context (1, tokens, width), pooled (1, width) or None."""


@dataclass(frozen=True)
class Encoders:
    """What turns files into tensors.

    Args:
        image, text: the encoders.
        image_id, text_id: digests that differ when the encoders' weights do; they are part of the cache's keys.
    """

    image: ImageEncoder
    text: TextEncoder
    image_id: str
    text_id: str


def image_dataset(
    folder: Path,
    cache: Path,
    resolution: int,
    encoders: Encoders,
    progress: Callable[[int], Progress],
    trigger: str = "",
    default_caption: str = "",
) -> LatentDataset:
    """The dataset of a folder, encoding only what the cache does not hold.

    Args:
        folder: images with .txt captions.
        cache: a folder for the encoded tensors; what is done stays there if this is interrupted.
        resolution: side of the square that images are scaled and cropped to, pixels, a multiple of 8.
        encoders: VAE and text encoder.
        progress: makes the bar for a total.
        trigger, default_caption: see `find_pictures`.

    Raises:
        ValueError: see `find_pictures`; a resolution that does not fit; no image that can be read.
    """
    if resolution < 8 or resolution % 8:
        raise ValueError(f"resolution must be a multiple of 8 and at least 8, not {resolution}")
    pictures = find_pictures(folder, trigger, default_caption)
    defaulted = [picture.path.name for picture in pictures if picture.defaulted]
    if defaulted:
        _LOG.warning("%d images have no caption, '%s' is used: %s", len(defaulted), default_caption, named(defaulted))
    latents = ShardStore(cache / f"latents-{_settings_key(encoders.image_id)}")
    texts = ShardStore(cache / f"texts-{_settings_key(encoders.text_id)}")
    items, skipped = _encoded(pictures, resolution, encoders, latents, texts, progress)
    if not items:
        reasons = [f"{name} ({reason})" for name, reason in skipped.items()]
        raise ValueError(f"folder '{folder.name}': none of its {len(skipped)} images can be read: {named(reasons)}")
    return LatentDataset(folder.name, tuple(items), latents, texts, skipped, tuple(defaulted))


def _encoded(
    pictures: Sequence[Picture],
    resolution: int,
    encoders: Encoders,
    latents: ShardStore,
    texts: ShardStore,
    progress: Callable[[int], Progress],
) -> tuple[list[Item], dict[str, str]]:
    """Items of the readable pictures, encoded; and the unreadable ones with the reason."""
    keys = [f"{content_key(picture.path)}-{resolution}x{resolution}" for picture in pictures]
    captions = [c for c in dict.fromkeys([p.caption for p in pictures] + [""]) if context_key(c) not in texts]
    to_do = len(captions) + sum(key not in latents for key in keys)
    items, skipped = [], {}
    with _bar(progress, to_do) as advance, _flushed(latents, texts):
        for picture, key in zip(pictures, keys, strict=True):
            new = key not in latents
            reason = _add_latent(latents, key, picture, resolution, encoders.image) if new else ""
            if reason:
                skipped[picture.path.name] = reason
                _LOG.warning("The image %s cannot be read and is skipped: %s", picture.path, reason)
            else:
                items.append(Item(picture.path.name, picture.caption, key, resolution, resolution))
            if new:
                advance(picture.path.name)
        for caption in captions:
            _add_text(texts, caption, encoders.text)
            advance(caption)
    return items, skipped


def _add_latent(latents: ShardStore, key: str, picture: Picture, resolution: int, encode: ImageEncoder) -> str:
    """Encodes a picture into the store; the reason if it cannot be read, else ""."""
    try:
        image = read_image(picture.path, resolution, resolution)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for broken files
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    latents.add({key: _finite(encode(image), picture.path.name)})
    return ""


def _add_text(texts: ShardStore, caption: str, encode: TextEncoder) -> None:
    context, pooled = encode(caption)
    tensors = {context_key(caption): context} | ({} if pooled is None else {pooled_key(caption): pooled})
    texts.add({key: _finite(tensor, caption) for key, tensor in tensors.items()})


def _finite(encoding: Tensor, name: str) -> Tensor:
    """The encoding in float32; ValueError if it holds NaN or infinity, before it gets into the cache."""
    if not torch.isfinite(encoding).all():
        raise ValueError(
            f"the encoding of '{name}' holds NaN or infinity: the VAE or text encoder overflowed (an fp16 VAE is the"
            " usual cause); load it in fp32 or bf16"
        )
    return encoding.float()


@contextmanager
def _bar(progress: Callable[[int], Progress], total: int) -> Iterator[Callable[[str], None]]:
    """A function that advances the bar by one; no bar where there is nothing to do."""
    bar = progress(total) if total else None
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        if bar is not None:
            bar.update(done, text)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def _flushed(*stores: ShardStore) -> Iterator[None]:
    """Writes what the stores still hold at the end, interrupted or not."""
    try:
        yield
    finally:
        for store in stores:
            store.flush()


def _settings_key(encoder_id: str) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, encoder_id]).encode()).hexdigest()[:16]
