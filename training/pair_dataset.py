"""What D2F_DATASET carries when it is reflow pairs: latents with the noise that the teacher made them of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import draws
from .buckets import Size
from .dataset import Batch, context_key, encoded, longest_of
from .identity import WEIGHTS, Facts, facts_of
from .pairs import PairStore
from .port import Source
from .shards import ShardStore


@dataclass(frozen=True, eq=False)
class PairDataset:
    """Reflow pairs for training; its memory is 16 bytes a pair.

    Args:
        name: of the folder.
        store: where the pairs are.
        texts: embeddings of their captions, and of the empty one.
        pairs: numbers of the pairs in it (N,) int64, at least one.
        size: (width, height) of the images, pixels.
        notes: for the summary, a line each.
        text_id: `identity.Identity` of the text encoder.
    """

    name: str
    store: PairStore = field(repr=False)
    texts: ShardStore = field(repr=False)
    pairs: Tensor = field(repr=False)
    size: Size
    notes: tuple[str, ...] = ()
    text_id: str = ""

    largest = 0
    mirrored = False
    has_noise = True
    image_channels = 0

    def __post_init__(self) -> None:
        if not len(self.pairs):
            raise ValueError(f"dataset: '{self.name}' holds no pair yet; raise count, or run the other shards first")

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(
        self, indices: Sequence[int], flipped: Sequence[bool] | None = None, dropped: Sequence[bool] | None = None
    ) -> Batch:
        """The pairs at `indices`, each with its noise and caption.

        Args:
            indices: of pairs, 0 .. len - 1.
            flipped: without effect, no pair is mirrored.
            dropped: which have the empty caption instead of their own.

        Raises:
            ValueError: a shard that was damaged meanwhile, noise that this torch draws otherwise.
        """
        numbers = self.pairs[list(indices)].tolist()
        left_out = zip(dropped or [False] * len(numbers), numbers, strict=True)
        captions = tuple("" if without else self.store.caption(pair) for without, pair in left_out)
        latent = torch.cat([self.store.latent(pair) for pair in numbers])
        noise = torch.stack([self.store.noise_of(pair) for pair in numbers])
        sizes = image_sizes(self.size).expand(len(numbers), -1)
        return Batch(latent, *encoded(self.texts, captions), sizes, captions=captions, noise=noise)

    def captions(self) -> Iterator[str]:
        """The caption of every pair."""
        return (self.store.caption(pair) for pair in self.pairs.tolist())

    @property
    def longest(self) -> int:
        """Index of a pair with the longest context."""
        return longest_of(self.texts, self.captions())

    @property
    def buckets(self) -> tuple[range]:
        """One, of all pairs."""
        return (range(len(self)),)

    @property
    def bucket_counts(self) -> dict[Size, int]:
        """All pairs have one size."""
        return {self.size: len(self)}

    @property
    def nominal_size(self) -> Size:
        """The size of the images."""
        return self.size

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.store.latent(int(self.pairs[0])).shape[1]

    @property
    def context_width(self) -> int:
        """Width of the text embeddings."""
        return self.texts.shape(context_key(""))[2]

    @property
    def sources(self) -> dict[str, Source]:
        """The folder; the captions of millions of pairs are not counted."""
        return {self.name: Source(len(self))}

    def split(self, share: float, seed: int) -> tuple[PairDataset, PairDataset]:
        """Training and held-out part, pairs drawn by the seed.

        Args:
            share: of the pairs that is held out, above 0 and below 1; at least one is on either side.

        Raises:
            ValueError: a share out of its range, or fewer than two pairs.
        """
        if not 0 < share < 1 or len(self) < 2:
            raise ValueError(
                f"dataset: of the {len(self)} pairs in '{self.name}' a share of {share} cannot be held out for"
                " validation; give two pairs at least and a share above 0 and below 1 (0.1 is usual)"
            )
        order = torch.randperm(len(self), generator=draws.generator(seed, "held-out pairs"))
        held = min(len(self) - 1, max(1, math.floor(share * len(self))))
        train, out = order[held:].sort().values, order[:held].sort().values
        return self.chosen(train), self.chosen(out)

    def chosen(self, indices: Tensor, note: str = "") -> PairDataset:
        """Only the pairs at `indices` (N,), with a line more in the summary."""
        return replace(self, pairs=self.pairs[indices], notes=(*self.notes, note) if note else self.notes)

    def joined(self, other: object) -> PairDataset:
        """Pairs cannot be joined with another dataset.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"dataset: '{self.name}' holds reflow pairs, which cannot be joined with images; connect a dataset of"
            " images, or train on the pairs alone"
        )

    def identity(self) -> str:
        """Digest of everything that a run on it depends on."""
        sha = hashlib.sha256(f"{self.store.identity_digest}/{self.text_id}/".encode())
        sha.update(self.pairs.numpy().tobytes())
        return sha.hexdigest()[:16]

    def facts(self) -> Facts:
        """What `identity` depends on, in words."""
        return {"set of pairs": {WEIGHTS: self.store.identity_digest}, "text encoder": facts_of(self.text_id)}

    def summary(self) -> str:
        """What is in it, in a few lines."""
        width, height = self.size
        return "\n".join([f"{len(self)} pairs of {width}×{height} px from '{self.name}'", *self.notes])


def image_sizes(size: Size) -> Tensor:
    """SDXL's six of an uncropped image, (1, 6): height, width, 0, 0, height, width."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]])
