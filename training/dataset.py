"""What D2F_DATASET carries: latents and text embeddings on disk, read a batch at a time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .images import named
from .shards import ShardStore


@dataclass(frozen=True)
class Item:
    """One training item: keys into the stores, and its size in pixels."""

    name: str
    caption: str
    latent: str
    width: int
    height: int


@dataclass(frozen=True)
class Batch:
    """A training batch, on the CPU.

    Args:
        latent: (B, C, h, w) in the autoencoder's scale.
        context: (B, tokens, width) text embeddings.
        pooled: (B, width), or None where the text encoder has none.
        sizes: (B, 6) int64, pixels: original height and width, crop's top and left, target height and width.
    """

    latent: Tensor
    context: Tensor
    pooled: Tensor | None
    sizes: Tensor


@dataclass(frozen=True, eq=False)
class LatentDataset:
    """What D2F_DATASET carries.

    Args:
        name: of the folder.
        items: one for each readable image.
        latents, texts: where the tensors are.
        skipped: unreadable files and the reason.
        defaulted: files that took the default caption.
    """

    name: str
    items: tuple[Item, ...]
    latents: ShardStore = field(repr=False)
    texts: ShardStore = field(repr=False)
    skipped: dict[str, str] = field(default_factory=dict)
    defaulted: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The items at `indices`, which have one size, each with its own caption.

        Contexts of unequal length are repeated to a common one, which attention does not notice.
        """
        items = [self.items[i] for i in indices]
        contexts = [self.texts.get(context_key(item.caption)) for item in items]
        pooled_keys = [key for item in items if (key := pooled_key(item.caption)) in self.texts]
        return Batch(
            latent=torch.cat([self.latents.get(item.latent) for item in items]),
            context=torch.cat(_same_length(contexts)),
            pooled=torch.cat([self.texts.get(key) for key in pooled_keys]) if pooled_keys else None,
            sizes=torch.tensor([(item.height, item.width, 0, 0, item.height, item.width) for item in items]),
        )

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.latents.shape(self.items[0].latent)[1]

    @property
    def context_width(self) -> int:
        """Width of the text embeddings."""
        return self.texts.shape(context_key(self.items[0].caption))[2]

    @property
    def caption_counts(self) -> Counter[str]:
        """How often each comma-separated part of the captions occurs."""
        tags = (tag.strip() for item in self.items for tag in item.caption.split(","))
        return Counter(tag for tag in tags if tag)

    def summary(self) -> str:
        """What is in it, in a few lines; skipped files and defaulted captions by name and number."""
        first = self.items[0]
        lines = [
            f"{len(self)} images of {first.width}×{first.height} px,"
            f" {len({item.caption for item in self.items})} different captions, from '{self.name}'"
        ]
        if self.skipped:
            reasons = [f"{name} ({reason})" for name, reason in self.skipped.items()]
            lines.append(f"{len(self.skipped)} unreadable and skipped: {named(reasons)}")
        if self.defaulted:
            lines.append(
                f"{len(self.defaulted)} without a caption file, given the default: {named(list(self.defaulted))}"
            )
        return "\n".join(lines)


def context_key(caption: str) -> str:
    """Key of a caption's context in the text store."""
    return f"{_text_key(caption)}/context"


def pooled_key(caption: str) -> str:
    """Key of a caption's pooled embedding, where the text encoder has one."""
    return f"{_text_key(caption)}/pooled"


def _text_key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def _same_length(contexts: Sequence[Tensor]) -> list[Tensor]:
    length = math.lcm(*(context.shape[1] for context in contexts))
    return [context.repeat(1, length // context.shape[1], 1) for context in contexts]
