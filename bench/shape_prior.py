"""Flat coloured shapes as what a tiny prior is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import shapes, tiny_taesd
from .scene_prior import HELD_OUT_SEED, TRAINED_SEED, SceneCaptions
from .subjects import text_encoder

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

_PART, _MEASURED = 250, 64


class ShapeSubject:
    """Pictures of one or two shapes with their captions.

    Args:
        count: how many pictures.
    """

    def __init__(self, count: int) -> None:
        drawings = [shapes.drawing(index, TRAINED_SEED) for index in range(count)]
        texts = [each.prompt.text for each in drawings]
        self._texts = list(dict.fromkeys(texts))
        numbers = {text: number for number, text in enumerate(self._texts)}
        self._labels = torch.tensor([numbers[text] for text in texts])
        self._pictures = torch.cat(
            [shapes.rendered(drawings[first : first + _PART]) for first in range(0, count, _PART)]
        )

    @property
    def labels(self) -> Tensor:
        """(N,), which caption each picture has."""
        return self._labels

    def pictures(self) -> Iterator[Tensor]:
        """All pictures, batches (B, 64, 64, 3) in [0, 1]."""
        yield from self._pictures.split(_PART)

    def shown(self, count: int, random: torch.Generator) -> tuple[Tensor, int]:
        """Any of the pictures."""
        return self._pictures[torch.randint(0, len(self._pictures), (count,), generator=random)], count

    def captions(self, text: Mapping[str, Tensor]) -> SceneCaptions:
        """Each different caption is encoded once."""
        from tqdm import tqdm

        encoder = text_encoder(text)
        texts = tqdm(["", *self._texts], desc="captions", mininterval=5.0)
        contexts = torch.cat([encoder.encode(each)[0][0].half() for each in texts])
        return SceneCaptions(contexts[1:], contexts[:1].float())

    def measured(self, autoencoder: AutoencoderTiny) -> dict[str, float]:
        """ "picture_error": mean absolute error of unseen pictures in [0, 1] that were encoded and decoded."""
        pictures = shapes.rendered([shapes.drawing(index, HELD_OUT_SEED) for index in range(_MEASURED)])
        again = tiny_taesd.decode(autoencoder, tiny_taesd.encode(autoencoder, pictures))
        return {"picture_error": float((again - pictures).abs().mean())}
