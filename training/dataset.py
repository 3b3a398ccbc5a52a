"""What D2F_DATASET carries: latents, masks and text embeddings on disk, read a batch at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .buckets import Size
from .captions import literal
from .contexts import padded
from .identity import WEIGHTS, Facts, facts_of, settings_that_differ
from .images import named
from .port import Source
from .shards import ShardStore, Stores

_SIZES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Item:
    """One training item, an image at one size: keys into the stores, and its geometry in pixels.

    Args:
        name: of the image.
        caption: of the image.
        latent: key of the latent.
        width, height: of the item, what the latent was encoded from.
        repeats: how often it counts in an epoch, at least 1.
        flipped: key of the mirrored image's latent, "" if there is none.
        mask: key of the mask (1, 1, h, w), in the latent's resolution, in the store of the latents; "" if none.
        original_width, original_height: of the image as it was; 0 where that is the item's.
        crop_left, crop_top: where the item begins in the image scaled to cover it.
        crop_right: columns cut off on the right, which is the mirrored image's crop_left.
        mask_floor: weight of what the mask leaves out, from 0 to 1.
        content: key of the image, the same for all its sizes; "" where it has but one.
        source: the folder that it is from, "" where that is the dataset.
        image: key of the latent of the image that the network looks at beside the noisy latent; "" if none.
        flipped_image: key of the same mirrored.
        weighted: whether brackets in the caption weigh words, as in prompts.
        inversions: the files of the textual inversions that the caption names, "" if none.
    """

    name: str
    caption: str
    latent: str
    width: int
    height: int
    repeats: int = 1
    flipped: str = ""
    mask: str = ""
    original_width: int = 0
    original_height: int = 0
    crop_left: int = 0
    crop_top: int = 0
    crop_right: int = 0
    mask_floor: float = 0.0
    content: str = ""
    source: str = ""
    image: str = ""
    flipped_image: str = ""
    weighted: bool = field(default=False, repr=False)
    inversions: str = field(default="", repr=False)

    @property
    def prompt(self) -> str:
        """What the text encoder is given."""
        return self.caption if self.weighted else literal(self.caption)

    @property
    def text(self) -> str:
        """All that its encoding depends on beside the encoder."""
        return f"{self.prompt}\0{self.inversions}" if self.inversions else self.prompt

    def sizes(self, mirrored: bool = False) -> Sequence[int]:
        """SDXL's six: original height and width, crop's top and left, target height and width."""
        original = (self.original_height or self.height, self.original_width or self.width)
        left = self.crop_right if mirrored else self.crop_left
        return (*original, self.crop_top, left, self.height, self.width)


@dataclass(frozen=True)
class Batch:
    """A training batch, on the CPU.

    Args:
        latent: (B, C, h, w) in the autoencoder's scale.
        context: (B, tokens, width) text embeddings.
        pooled: (B, width), or None where the text encoder has none.
        sizes: (B, 6) int64, pixels: original height and width, crop's top and left, target height and width.
        mask: (B, 1, h, w) float32 weights of the loss in [0, 1], ones where an item has no mask; None if none has.
        captions: of the items, as the text encoder takes them, "" where dropped.
        noise: (B, C, h, w) float32, the x_noise that belongs to each latent; None where it is drawn in training.
        image: (B, C, h, w) latents, in the autoencoder's scale, of the images that the network looks at; None if none.
    """

    latent: Tensor
    context: Tensor
    pooled: Tensor | None
    sizes: Tensor
    mask: Tensor | None = None
    captions: tuple[str, ...] = ()
    noise: Tensor | None = None
    image: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LatentDataset:
    """What D2F_DATASET carries.

    Args:
        name: of the folder.
        items: one for each readable image and size.
        latents, texts: where the tensors are; the texts hold the empty caption, too.
        skipped: unreadable files and the reason.
        defaulted: files that took the default caption.
        notes: more for the summary, a line each.
        resolution: side of the square that sizes are meant to have the area of, pixels; 0 if unknown.
        image_id, text_id: digests of the encoders' weights, "" if unknown.
    """

    name: str
    items: tuple[Item, ...]
    latents: ShardStore | Stores = field(repr=False)
    texts: ShardStore | Stores = field(repr=False)
    skipped: dict[str, str] = field(default_factory=dict)
    defaulted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    resolution: int = 0
    image_id: str = ""
    text_id: str = ""

    has_noise = False

    def __len__(self) -> int:
        return len(self.items)

    def batch(
        self, indices: Sequence[int], flipped: Sequence[bool] | None = None, dropped: Sequence[bool] | None = None
    ) -> Batch:
        """The items at `indices`, which have one size, each with its own caption.

        Contexts of unequal length are continued to the longest one, see `contexts.padded`.

        Args:
            indices: of items.
            flipped: which are mirrored, latent, mask and crop; items without a mirrored latent stay as they are.
            dropped: which have the empty caption instead of their own.

        Raises:
            ValueError: items of unequal size; a shard that was damaged meanwhile.
        """
        items = [self.items[i] for i in indices]
        _require_one_size(items)
        mirrored = [bool(f and item.flipped) for f, item in zip(flipped or [False] * len(items), items, strict=True)]
        left_out = list(zip(dropped or [False] * len(items), items, strict=True))
        captions = tuple("" if without else item.prompt for without, item in left_out)
        keys = [item.flipped if flip else item.latent for item, flip in zip(items, mirrored, strict=True)]
        latent = torch.cat([self.latents.get(key) for key in keys])
        context, pooled = encoded(self.texts, ["" if without else item.text for without, item in left_out])
        sizes = torch.tensor([item.sizes(flip) for item, flip in zip(items, mirrored, strict=True)])
        mask, image = self._mask(items, mirrored, latent.shape[-2:]), self._images(items, mirrored)
        return Batch(latent, context, pooled, sizes, mask, captions, image=image)

    @property
    def image_channels(self) -> int:
        """C of the images that the network looks at; 0 where there are none."""
        first = self.items[0].image
        return self.latents.shape(first)[1] if first else 0

    @cached_property
    def buckets(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the items of each size, sizes in ascending order (width, height); repeated items repeatedly."""
        found: dict[Size, list[int]] = {}
        for i, item in enumerate(self.items):
            found.setdefault((item.width, item.height), []).extend([i] * item.repeats)
        return tuple(tuple(found[size]) for size in sorted(found))

    @property
    def bucket_counts(self) -> dict[Size, int]:
        """For each size (width, height), in the order of `buckets`, how many items an epoch has, repeats counted."""
        return {(self.items[b[0]].width, self.items[b[0]].height): len(b) for b in self.buckets}

    @property
    def nominal_size(self) -> Size:
        """The square of the resolution, or the largest size where that is unknown."""
        largest = max(((item.width, item.height) for item in self.items), key=lambda size: (size[0] * size[1], size))
        return (self.resolution, self.resolution) if self.resolution else largest

    def captions(self) -> Iterator[str]:
        """The caption of every item, as a prompt."""
        return (item.prompt for item in self.items)

    @property
    def largest(self) -> int:
        """Index of an item with the most pixels."""
        return max(range(len(self.items)), key=lambda i: self.items[i].width * self.items[i].height)

    @property
    def longest(self) -> int:
        """Index of an item with the longest context."""
        return longest_of(self.texts, (item.text for item in self.items))

    @property
    def mirrored(self) -> bool:
        """Whether there are mirrored latents."""
        return any(item.flipped for item in self.items)

    @property
    def sources(self) -> dict[str, Source]:
        """The folders that it is from: their images (images at several sizes once), repeats and tags."""
        return {name: Source(len(i), i[0].repeats, tag_counts(i)) for name, i in self.pictures.items()}

    def identity(self) -> str:
        """Digest of everything that a run on it depends on."""
        data = (self.items, self.image_id, self.text_id)
        texts = tuple(item.text for item in self.items)
        otherwise = () if texts == tuple(item.caption for item in self.items) else (texts,)
        return hashlib.sha256(repr((*data, *otherwise)).encode()).hexdigest()[:16]

    def facts(self) -> Facts:
        """What `identity` depends on, in words."""
        texts, pictures = ([getattr(item, name) for item in self.items] for name in ("text", "latent"))
        return {
            "VAE": facts_of(self.image_id),
            "text encoder": facts_of(self.text_id),
            "set of captions": {WEIGHTS: _digest(repr(texts))},
            "set of images": {WEIGHTS: _digest(repr(pictures))},
        }

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.latents.shape(self.items[0].latent)[1]

    @property
    def context_width(self) -> int:
        """Width of the text embeddings."""
        return self.texts.shape(context_key(self.items[0].text))[2]

    @property
    def pictures(self) -> dict[str, list[Item]]:
        """Per source folder, one item of each image (images at several sizes once)."""
        found: dict[str, dict[tuple[str, str], Item]] = {}
        for item in self.items:
            found.setdefault(item.source or self.name, {}).setdefault((item.name, item.content), item)
        return {source: list(items.values()) for source, items in found.items()}

    @property
    def caption_counts(self) -> Counter[str]:
        """How often each comma-separated part of the images' captions occurs."""
        return tag_counts([item for items in self.pictures.values() for item in items])

    def split(self, share: float, seed: int) -> tuple[LatentDataset, LatentDataset]:
        """Training and held-out part: the images whose hashes with the seed are the lowest are held out.

        All sizes of an image, and copies of it, are on one side.

        Args:
            share: of the images that is held out, above 0 and below 1; at least one image is on either side.
            seed: chooses other images.

        Raises:
            ValueError: a share out of its range, or fewer than two different images.
        """
        if not 0 < share < 1:
            raise ValueError(f"the held-out share must be above 0 and below 1 (0.1 is usual), not {share}")
        pictures = sorted({_picture(item) for item in self.items}, key=lambda key: _digest(f"{seed}/{key}"))
        if len(pictures) < 2:
            raise ValueError(
                f"dataset: '{self.name}' has {len(pictures)} image, of which none can be held out for validation; give"
                " two different ones at least, or hold nothing out"
            )
        held = set(pictures[: min(len(pictures) - 1, max(1, round(share * len(pictures))))])
        train = tuple(item for item in self.items if _picture(item) not in held)
        return replace(self, items=train), replace(self, items=tuple(i for i in self.items if _picture(i) in held))

    def joined(self, other: LatentDataset) -> LatentDataset:
        """Both datasets as one, this one's items first.

        Raises:
            ValueError: they were made with different VAEs or text encoders, the other one is no such dataset, or only
                one has images that the network looks at.
        """
        if not isinstance(other, LatentDataset):
            return other.joined(self)  # which says why not
        if self.image_channels != other.image_channels:
            raise ValueError(
                f"dataset: of '{self.name}' and '{other.name}' one holds depth and the other does not; train them apart"
            )
        for what, mine, others in (
            ("VAE", self.image_id, other.image_id),
            ("text encoder", self.text_id, other.text_id),
        ):
            if mine != others:
                settings = [f"{name}: {one} and {two}" for name, one, two in settings_that_differ(mine, others)]
                raise ValueError(
                    f"dataset: '{self.name}' and '{other.name}' were made with different {what}s and cannot be joined"
                    f"{' (' + '; '.join(settings) + ')' if settings else ''}; make both with the checkpoint that is"
                    " trained, set alike"
                )
        return replace(
            self,
            name=self.name if self.name == other.name else f"{self.name} + {other.name}",
            items=tuple(_with_source(item, part.name) for part in (self, other) for item in part.items),
            latents=Stores(self.latents, other.latents),
            texts=Stores(self.texts, other.texts),
            skipped={**self.skipped, **other.skipped},
            defaulted=(*self.defaulted, *other.defaulted),
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
            resolution=max(self.resolution, other.resolution),
        )

    def summary(self) -> str:
        """What is in it, in a few lines; skipped files and defaulted captions by name and number."""
        captions = len({item.caption for item in self.items})
        what = "images with their depth" if self.image_channels else "images"
        lines = [f"{len(self)} {what} of {self._sizes_shown()}, {captions} different captions, from '{self.name}'"]
        lines += self._features()
        if self.skipped:
            reasons = [f"{name} ({reason})" for name, reason in self.skipped.items()]
            lines.append(f"{len(self.skipped)} unreadable and skipped: {named(reasons)}")
        if self.defaulted:
            lines.append(
                f"{len(self.defaulted)} without a caption file, given the default: {named(list(self.defaulted))}"
            )
        return "\n".join([*lines, *self.notes])

    def _sizes_shown(self) -> str:
        counts = sorted(Counter((item.width, item.height) for item in self.items).items(), key=lambda entry: -entry[1])
        if len(counts) == 1:
            return "{}×{} px".format(*counts[0][0])
        shown = [f"{width}×{height}: {count}" for (width, height), count in counts[:_SIZES_SHOWN]]
        more = [f"{len(counts) - _SIZES_SHOWN} more"] if len(counts) > _SIZES_SHOWN else []
        return f"{len(counts)} sizes (px; {', '.join(shown + more)})"

    def _features(self) -> list[str]:
        """Repeats, mirrored images and masks, a line each, where there are any."""
        lines = []
        if any(item.repeats > 1 for item in self.items):
            repeated = Counter((item.source or self.name, item.repeats) for item in self.items)
            parts = [f"{count} × {repeats} in '{source}'" for (source, repeats), count in repeated.items()]
            lines.append(f"{sum(item.repeats for item in self.items)} with repeats: {named(parts)}")
        if flipped := sum(bool(item.flipped) for item in self.items):
            lines.append(f"{flipped} also mirrored")
        if masked := [item for item in self.items if item.mask]:
            floors = sorted({f"{item.mask_floor:g}" for item in masked})
            lines.append(f"{len(masked)} with a mask; what it leaves out weighs {' or '.join(floors)}")
        return lines

    def _images(self, items: Sequence[Item], mirrored: Sequence[bool]) -> Tensor | None:
        if not all(item.image for item in items):
            return None
        keys = [item.flipped_image if flip else item.image for item, flip in zip(items, mirrored, strict=True)]
        return torch.cat([self.latents.get(key) for key in keys])

    def _mask(self, items: Sequence[Item], mirrored: Sequence[bool], shape: Sequence[int]) -> Tensor | None:
        if not any(item.mask for item in items):
            return None
        masks = []
        for item, flip in zip(items, mirrored, strict=True):
            mask = self.latents.get(item.mask) if item.mask else torch.ones(1, 1, *shape)
            mask = item.mask_floor + (1 - item.mask_floor) * mask
            masks.append(mask.flip(-1) if flip else mask)
        return torch.cat(masks)


def encoded(stored: ShardStore | Stores, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Context (B, tokens, width), the shorter ones `padded`; pooled (B, width) or None; float32."""
    contexts = [stored.get(context_key(text)) for text in texts]
    context = padded(contexts, lambda: stored.get(context_key(""))).float()
    keys = [pooled_key(text) for text in texts]
    if not all(key in stored for key in keys):
        return context, None
    return context, torch.cat([stored.get(key) for key in keys]).float()


def longest_of(stored: ShardStore | Stores, texts: Iterable[str]) -> int:
    """Index of a text with the longest context; each text is looked up once."""
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(text, i)
    return first[max(first, key=lambda text: stored.shape(context_key(text))[1])]


def tag_counts(items: Sequence[Item]) -> Counter[str]:
    """How often each comma-separated part of their captions occurs."""
    tags = (tag.strip() for item in items for tag in item.caption.split(","))
    return Counter(tag for tag in tags if tag)


def context_key(text: str) -> str:
    """Key of the context of a prompt, or of an item's `text`, in the text store."""
    return f"{_digest(text)}/context"


def pooled_key(text: str) -> str:
    """Key of its pooled embedding, where the text encoder has one."""
    return f"{_digest(text)}/pooled"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _picture(item: Item) -> str:
    return item.content or item.latent


def _with_source(item: Item, name: str) -> Item:
    return item if item.source else replace(item, source=name)


def _require_one_size(items: Sequence[Item]) -> None:
    sizes = sorted({(item.width, item.height) for item in items})
    if len(sizes) > 1:
        shown = ", ".join(f"{width}×{height}" for width, height in sizes)
        raise ValueError(f"a batch has one size, but its items have {shown} px; draw it from one bucket")
