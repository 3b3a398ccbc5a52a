"""How good the prior is: what the reader sees in its pictures, and their Fréchet distance to held-out real ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...metrics.frechet import frechet_distance
from . import captions, data, latents, sampling
from .moving import moved
from .reader import Classes, Reader, trained
from .stored import Prior

log = logging.getLogger(__name__)
_TOP = 5
_REAL_VARIANTS = 4


@dataclass(frozen=True)
class Verdict:
    """Of the pictures that were drawn with one number of steps and one guidance.

    Args:
        steps, cfg: of the sampling.
        style, category, objects: shares read right, of learned pairs and of held-out ones; objects in the top 5.
        distance: Fréchet distance to real held-out pictures in the reader's features.
    """

    steps: int
    cfg: float
    style: tuple[float, float]
    category: tuple[float, float]
    objects: tuple[float, float]
    distance: float

    def line(self) -> str:
        """A row of a Markdown table."""
        shares = (
            f"{100 * learned:.1f} / {100 * held:.1f}" for learned, held in (self.style, self.category, self.objects)
        )
        return f"| {self.steps} | {self.cfg:g} | {' | '.join(shares)} | {self.distance:.2f} |"


HEAD = """| steps | CFG | style, % | category, % | object in top 5, % | Fréchet distance |
|---|---|---|---|---|---|"""
"""Of the table; shares of learned pairs / of held-out ones."""


class Judge:
    """Judges a prior.

    Args:
        pictures: all real ones.
        work: folder of the reader's state.
        count: prompts; half of learned pairs, half of held-out ones.
    """

    def __init__(self, pictures: data.Pictures, work: Path, count: int) -> None:
        self._reader = trained(pictures, work)
        self._classes = Classes.of(pictures.about)
        held = pictures.chosen(lambda picture: picture.held_out)
        learned = [picture for picture in pictures.about if not picture.held_out]
        self._asked = _some(learned, count - count // 2), _some(held.about, count // 2)
        self._reference = _features_of_real(self._reader, held)

    def reference(self, pictures: data.Pictures) -> tuple[float, ...]:
        """Shares of real held-out pictures that the reader reads right: style, category, object in the top 5."""
        held = pictures.chosen(lambda picture: picture.held_out)
        return self._shares(self._reader.read(held.images()), held.about)

    def verdicts(self, prior: Prior, steps: Sequence[int], guidances: Sequence[float]) -> Iterator[Verdict]:
        """One for each number of steps and guidance."""
        for count in steps:
            for cfg in guidances:
                yield self._verdict(prior, count, cfg)

    def _verdict(self, prior: Prior, steps: int, cfg: float) -> Verdict:
        shares, features = [], []
        for about in self._asked:
            prompts = [captions.usual(picture.style, picture.name) for picture in about]
            made = sampling.drawn(prior, prompts, range(len(prompts)), steps, cfg)
            shares.append(self._shares(self._reader.read(made), about))
            features.append(self._reader.features(made))
        style, category, objects = zip(*shares, strict=True)
        return Verdict(steps, cfg, style, category, objects, frechet_distance(torch.cat(features), self._reference))

    def _shares(self, logits: Sequence[Tensor], about: Sequence[data.Picture]) -> tuple[float, ...]:
        labels = self._classes.labels(about)
        tops = (1, 1, _TOP)
        right = [
            (part.topk(top, dim=1).indices == labels[:, i, None]).any(dim=1)
            for i, (part, top) in enumerate(zip(logits, tops, strict=True))
        ]
        return tuple(float(one.float().mean()) for one in right)


def _some(about: Sequence[data.Picture], count: int) -> list[data.Picture]:
    """That many of the pictures, always the same."""
    return sorted(about, key=lambda p: hashlib.sha256(f"{p.hexcode} {p.style}".encode()).digest())[:count]


def _features_of_real(reader: Reader, held: data.Pictures) -> Tensor:
    """Of the held-out pictures, moved as those that are learned from."""
    random, parts = torch.Generator().manual_seed(1), []
    mirrored = torch.tensor([picture.mirrored for picture in held.about])
    for _ in range(_REAL_VARIANTS):
        images = moved(torch.from_numpy(held.pixels), mirrored, latents.MOTION, random)
        parts.append(reader.features(images.movedim(1, -1)))
    return torch.cat(parts)
