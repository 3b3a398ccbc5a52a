"""A small network that reads pictures: style, category and object, and features for Fréchet distances.

It is trained on the real pictures of all three styles, held-out ones too: it measures what is drawn, it draws nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..short_training import Plan, ShortTraining
from . import data, latents
from .moving import moved

log = logging.getLogger(__name__)
FEATURES = 128
_CHANNELS = (32, 64, 128, 256)
_PLAN = Plan(steps=8000, rate=3e-3, warm_up=100, average=0.998, save_every=120.0)
_BATCH = 64
_SMOOTHING, _DROPPED = 0.05, 0.2
_WEIGHTS = (3.0, 2.0, 1.0)
"""Of style, category and object in the loss; the object's is the largest by far."""


@dataclass(frozen=True)
class Classes:
    """What can be read.

    Args:
        styles, categories, objects: in the order of the logits; objects by their hexcodes.
    """

    styles: Sequence[str]
    categories: Sequence[str]
    objects: Sequence[str]

    @classmethod
    def of(cls, about: Sequence[data.Picture]) -> Classes:
        """Those of some pictures."""
        objects = dict.fromkeys(picture.hexcode for picture in about)
        return cls(tuple(data.STYLES), tuple(data.CATEGORIES.values()), tuple(objects))

    def labels(self, about: Sequence[data.Picture]) -> Tensor:
        """(N, 3): style, category and object of pictures."""
        places = [{name: i for i, name in enumerate(names)} for names in (self.styles, self.categories, self.objects)]
        rows = [(places[0][p.style], places[1][p.category], places[2][p.hexcode]) for p in about]
        return torch.tensor(rows)


class Reader(nn.Module):
    """Four strided convolutions and a layer of features.

    Args:
        classes: what it reads.
    """

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *_CHANNELS), _CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 5, 2, padding=2), nn.GroupNorm(8, after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_CHANNELS[-1] * 16, FEATURES))
        sizes = [len(names) for names in (classes.styles, classes.categories, classes.objects)]
        self.sizes = sizes
        self.head = nn.Linear(FEATURES, sum(sizes))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of style, category and object of images (B, 3, 64, 64) in [0, 1]; larger ones are averaged down."""
        features = functional.dropout(self._small(images).relu(), _DROPPED, self.training)
        return self.head(features).split(self.sizes, dim=1)

    def _small(self, images: Tensor) -> Tensor:
        return self.body(functional.adaptive_avg_pool2d(images, 64))

    @torch.no_grad()
    def features(self, pictures: Tensor, batch: int = 256) -> Tensor:
        """(B, 128) of pictures (B, H, W, 3) in [0, 1]."""
        return torch.cat([self._small(part) for part in pictures.movedim(-1, 1).split(batch)])

    @torch.no_grad()
    def read(self, pictures: Tensor, batch: int = 256) -> tuple[Tensor, ...]:
        """Logits of style, category and object of pictures (B, H, W, 3) in [0, 1]."""
        parts = [self(part) for part in pictures.movedim(-1, 1).split(batch)]
        return tuple(torch.cat(logits) for logits in zip(*parts, strict=True))


def trained(pictures: data.Pictures, work: Path, plan: Plan = _PLAN) -> Reader:
    """The reader, trained on the pictures, or as it was trained before (work/reader.safetensors)."""
    classes = Classes.of(pictures.about)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = Reader(classes)
    pixels, labels = _halved(torch.from_numpy(pictures.pixels)), classes.labels(pictures.about)
    mirrored = torch.tensor([picture.mirrored for picture in pictures.about])

    def loss(random: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(pixels), (_BATCH,), generator=random)
        images = _blurred(moved(pixels[chosen], mirrored[chosen], latents.MOTION, random), random)
        return torch.stack([
            weight * functional.cross_entropy(logits, labels[chosen, i], label_smoothing=_SMOOTHING)
            for i, (weight, logits) in enumerate(zip(_WEIGHTS, reader(images), strict=True))
        ]).sum()  # fmt: skip

    training = ShortTraining(reader, plan, work / "reader.safetensors", f"1 {len(classes.objects)}", "reader")
    training.run(loss)
    return training.averaged()  # type: ignore[return-value]


def _halved(pixels: Tensor) -> Tensor:
    """uint8 (N, H/2, W/2, 3) of (N, H, W, 3), averaged."""
    count, height, width, channels = pixels.shape
    blocks = pixels.reshape(count, height // 2, 2, width // 2, 2, channels)
    return torch.stack([block.float().mean(dim=(1, 3)).round().byte() for block in blocks])


def _blurred(images: Tensor, random: torch.Generator) -> Tensor:
    """Images as an autoencoder may return them: each blurred by its own degree, with a little noise."""
    coarse = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    degree = torch.rand(len(images), 1, 1, 1, generator=random)
    return images + degree * (coarse - images) + 0.02 * torch.randn(images.shape, generator=random)
