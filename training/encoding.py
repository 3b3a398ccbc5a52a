"""Images made into a dataset: everything encoded once, and what is done never done again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .buckets import Size, cover
from .captions import named_inversions
from .dataset import Item, LatentDataset, context_key, pooled_key
from .images import named
from .port import Progress
from .shards import ShardStore

_LOG = logging.getLogger(__name__)
_FORMAT = 3
"""Part of every cache key: raise it when what is cached changes its meaning."""

ImageEncoder = Callable[[Tensor], Tensor]
"""IMAGE (1, H, W, 3) in [0, 1] -> latent (1, C, h, w) in the autoencoder's scale."""
TextEncoder = Callable[[str], "tuple[Tensor, Tensor | None]"]
"""Caption -> context (1, tokens, width), pooled (1, width) or None."""
Inversions = Callable[[Sequence[str]], "Mapping[str, str]"]
"""Names of textual inversions -> digests of the files of those that there are."""
MakeProgress = Callable[[int], Progress]
"""Makes the bar for a total."""


@dataclass(frozen=True)
class Encoders:
    """What turns files into tensors.

    Args:
        image, text: the encoders.
        image_id, text_id: `identity.Identity` of each; they are part of the cache's keys.
        inversions: knows the files of textual inversions; their content is part of the keys of captions that name them.
    """

    image: ImageEncoder
    text: TextEncoder
    image_id: str
    text_id: str
    inversions: Inversions = lambda names: {}


@dataclass(frozen=True, slots=True)
class Job:
    """An item to be, and where its pixels come from.

    Args:
        item: with the keys that its tensors get.
        image: makes the IMAGE (1, H, W, 3) of the item's size.
        mask: makes the MASK (1, H, W), where the item has one.
        beside: makes the IMAGE that the network looks at, where the item has one.
    """

    item: Item
    image: Callable[[], Tensor]
    mask: Callable[[], Tensor] | None = None
    beside: Callable[[], Tensor] | None = None


class Cache:
    """Where a dataset's tensors are kept.

    Args:
        folder: for the shards; what is done stays there if encoding is interrupted.
        encoders: whose weights have their own shards.
    """

    def __init__(self, folder: Path, encoders: Encoders) -> None:
        self._encoders = encoders
        self.latents = ShardStore(folder / f"latents-{settings_key(encoders.image_id)}")
        self.texts = ShardStore(folder / f"texts-{settings_key(encoders.text_id)}")

    def dataset(self, name: str, jobs: Sequence[Job], progress: MakeProgress) -> LatentDataset:
        """Encodes what is missing, captions and the empty one as well; images that cannot be read are skipped.

        Raises:
            ValueError: an encoding is not finite.
        """
        jobs = self._with_inversions(jobs)
        skipped = self._encode(jobs, progress)
        items = tuple(job.item for job in jobs if job.item.name not in skipped)
        ids = {"image_id": self._encoders.image_id, "text_id": self._encoders.text_id}
        return LatentDataset(name, items, self.latents, self.texts, skipped, **ids)

    def _with_inversions(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """The jobs, their items with the textual inversions that their captions name."""
        names = named_inversions(job.item.prompt for job in jobs)
        if not names:
            return jobs
        known = self._encoders.inversions(names)

        def noted(item: Item) -> Item:
            own = named_inversions([item.prompt])
            files = {name: known[name] for name in own if name in known}  # none: they are missing, which counts, too
            return replace(item, inversions=json.dumps(files, sort_keys=True)) if own else item

        return [replace(job, item=noted(job.item)) for job in jobs]

    def _encode(self, jobs: Sequence[Job], progress: MakeProgress) -> dict[str, str]:
        """Does what is missing; the images that cannot be read, with the reason."""
        texts = {"": "", **{job.item.text: job.item.prompt for job in jobs}}
        missing = {text: prompt for text, prompt in texts.items() if context_key(text) not in self.texts}
        to_do = {job.item.latent for job in jobs if self._missing(job.item)}
        skipped: dict[str, str] = {}
        with bar(progress, len(to_do) + len(missing)) as advance, _flushed(self.latents, self.texts):
            for job in jobs:
                if not self._missing(job.item):
                    continue
                if job.item.name not in skipped and (reason := self._add_image(job)):
                    skipped[job.item.name] = reason
                    _LOG.warning("The image %s cannot be read and is skipped: %s", job.item.name, reason)
                advance(job.item.name)
            for text, prompt in missing.items():
                self.texts.add(text_tensors(text, *self._encoders.text(prompt)))
                advance(prompt)
        return skipped

    def _missing(self, item: Item) -> bool:
        keys = (item.latent, item.flipped, item.mask, item.image, item.flipped_image)
        return any(key and key not in self.latents for key in keys)

    def _add_image(self, job: Job) -> str:
        """Encodes what is missing of an item; the reason if it cannot be read, else ""."""
        item = job.item
        needs_mask = job.mask is not None and item.mask not in self.latents
        try:
            image, mask = job.image(), job.mask() if needs_mask and job.mask else None
            beside = None if job.beside is None else job.beside()
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for broken files
            return reason_of(error)
        self._add_latents(item.name, image, item.latent, item.flipped)
        if beside is not None:
            self._add_latents(item.name, beside, item.image, item.flipped_image)
        if mask is not None:
            shape = self.latents.shape(item.latent)[-2:]
            self.latents.add({item.mask: nn.functional.adaptive_avg_pool2d(mask.float().unsqueeze(0), shape)})
        return ""

    def _add_latents(self, name: str, image: Tensor, key: str, mirrored: str) -> None:
        """Encodes an IMAGE and its mirror image by their keys, as far as they have one and are missing."""
        for wanted, pixels in ((key, image), (mirrored, image.flip(2))):
            if wanted and wanted not in self.latents:
                self.latents.add({wanted: finite(self._encoders.image(pixels), name)})


def placed_item(
    name: str, caption: str, content: str, original: Size, size: Size, flips: bool = False, mask: str = ""
) -> Item:
    """The item of an image scaled to cover `size` and cropped in the middle.

    Args:
        name, caption: of the image.
        content: digest of its pixels or bytes.
        original: its size, (width, height) pixels.
        size: of the item.
        flips: whether there is a mirrored latent, too.
        mask: digest of the mask, "" if there is none.
    """
    place = cover(original, size)
    key = f"{content}-{size[0]}x{size[1]}"
    return Item(
        name,
        caption,
        key,
        *size,
        flipped=f"{key}-mirrored" if flips else "",
        mask=f"{mask}-{size[0]}x{size[1]}-mask" if mask else "",
        original_width=original[0],
        original_height=original[1],
        crop_left=place.left,
        crop_top=place.top,
        crop_right=place.right,
        content=content,
    )


def unreadable(where: str, skipped: dict[str, str]) -> str:
    """What is said where no image is left."""
    reasons = [f"{name} ({reason})" for name, reason in skipped.items()]
    return f"{where}: none of its {len(skipped)} images can be read: {named(reasons)}"


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def require_floor(mask_floor: float) -> None:
    """ValueError if a mask's floor is not from 0 to 1."""
    if not 0 <= mask_floor <= 1:
        raise ValueError(f"mask_floor must be from 0 (masked parts do not count) to 1, not {mask_floor}")


@contextmanager
def bar(progress: MakeProgress, total: int) -> Iterator[Callable[[str], None]]:
    """A function that advances the bar by one; no bar where there is nothing to do."""
    shown = progress(total) if total else None
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        if shown is not None:
            shown.update(done, text)

    try:
        yield advance
    finally:
        if shown is not None:
            shown.close()


def text_tensors(text: str, context: Tensor, pooled: Tensor | None) -> dict[str, Tensor]:
    """Context and pooled output of a prompt, or of an item's `text`, by their keys in a store, float32.

    SD1's pooled output comes from a projection that its checkpoints lack, and nothing reads it: one that is not finite
    is left out; where something does read it, `Backbone.conditioning` misses it by name.

    Raises:
        ValueError: the context is not finite.
    """
    tensors = {context_key(text): finite(context, text.partition("\0")[0])}
    if pooled is not None and torch.isfinite(pooled).all():
        tensors[pooled_key(text)] = pooled.float()
    return tensors


def finite(encoding: Tensor, name: str) -> Tensor:
    """The encoding in float32; ValueError if it holds NaN or infinity, before it gets into the cache."""
    if not torch.isfinite(encoding).all():
        raise ValueError(
            f"the encoding of '{name}' holds NaN or infinity: the VAE or text encoder overflowed (an fp16 VAE is the"
            " usual cause); load it in fp32 or bf16"
        )
    return encoding.float()


@contextmanager
def _flushed(*stores: ShardStore) -> Iterator[None]:
    """Writes what the stores still hold at the end, interrupted or not."""
    try:
        yield
    finally:
        for store in stores:
            store.flush()


def settings_key(encoder_id: str) -> str:
    """Part of the name of the folder that holds what an encoder made."""
    return hashlib.sha256(json.dumps([_FORMAT, encoder_id]).encode()).hexdigest()[:16]
