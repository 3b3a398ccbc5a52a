"""What a tiny prior is trained on, whatever it shows: pictures, their captions, and what its autoencoder must know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import ldm_layout

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

    from ..hosts.headless.text import TextEncoder

_EMPTY_CAPTIONS = 0.1


class Captions(Protocol):
    """The embeddings of captions, by their labels."""

    def drawn(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """A caption's embedding (B, 77, 768) for each label (B,); a tenth are empty."""
        ...


class Subject(Protocol):
    """Pictures with captions."""

    @property
    def labels(self) -> Tensor:
        """(N,), which caption each picture has."""
        ...

    def pictures(self) -> Iterator[Tensor]:
        """All that the network is trained on, in the labels' order: batches (B, 64, 64, 3) in [0, 1]."""
        ...

    def shown(self, count: int, random: torch.Generator) -> tuple[Tensor, int]:
        """Pictures (count, 64, 64, 3) for the autoencoder, and how many, the first, are as the network's."""
        ...

    def captions(self, text: Mapping[str, Tensor]) -> Captions:
        """Its captions, by the text encoder of these weights (of `text_weights.clip_l`)."""
        ...

    def measured(self, autoencoder: AutoencoderTiny) -> dict[str, float]:
        """How well the trained autoencoder does, by name; goes into the file's metadata."""
        ...


def text_encoder(text: Mapping[str, Tensor]) -> TextEncoder:
    """The text encoder that sampling uses.

    Args:
        text: weights of `text_weights.clip_l`.
    """
    from ..hosts.headless.text import read_text_encoder

    prefixed = {ldm_layout.TEXT_PREFIX + key: value for key, value in text.items()}
    return read_text_encoder(prefixed, "SD1", "the tiny prior", torch.device("cpu"))


def some_empty(contexts: Tensor, empty: Tensor, random: torch.Generator) -> Tensor:
    """Contexts (B, 77, 768), a tenth of them replaced by the empty caption's (1, 77, 768)."""
    chosen = torch.rand(len(contexts), generator=random) < _EMPTY_CAPTIONS
    return torch.where(chosen[:, None, None], empty, contexts)
