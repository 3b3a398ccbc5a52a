"""Samples of digits, and how good they are: read rightly, and how far from real ones."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import written_whole
from ..metrics.features import pixel_features
from ..metrics.frechet import frechet_distance
from ..nodes import NODE_CLASS_MAPPINGS
from . import classifier, digits
from .loaded_prior import LoadedPrior

_BATCH = 50


class Draw(Protocol):
    """Draws LATENT of CONDITIONING positive and negative, in the size and batch of a LATENT, from a seed."""

    def __call__(self, positive: Any, negative: Any, latent: Any, seed: int) -> Any: ...


class Judge:
    """Compares samples with held-out digits.

    Args:
        prior: that draws and decodes.
        style: of digits.STYLES.
        size: side of the pictures in pixels.

    Attributes:
        real: held-out digits in the style, as the autoencoder gives them back (N, size, size, 3).
    """

    def __init__(self, prior: LoadedPrior, style: str, size: int = digits.SIZE) -> None:
        self._host, self._clip, self._vae, self._size = prior.host, prior.clip, prior.vae, size
        self._known: dict[str, Any] = {}
        self.real = prior.kept(f"held_out_{style}_{size}", lambda: self._through_autoencoder(style))

    def _through_autoencoder(self, style: str) -> Tensor:
        """The held-out digits in a style, encoded and decoded."""
        images, _ = digits.split(held_out=True)
        parts = digits.render(images, digits.STYLES[style], self._size).split(_BATCH)
        return torch.cat([self._host.decode_image(self._vae, self._host.encode_image(self._vae, p)) for p in parts])

    def drawn(self, draw: Draw, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Pictures (count, size, size, 3), equally many of each digit, and the digits (count,).

        Args:
            draw: draws them.
            seed: 1000 seed + digit is that of a digit's samples.
            count: a multiple of 10.
        """
        each, pictures = count // len(digits.WORDS), []
        empty = self._encoded("")
        for digit in range(len(digits.WORDS)):
            positive = self._encoded(digits.caption(digit))
            latent = {"samples": torch.zeros(each, 4, self._size // 8, self._size // 8)}
            drawn = draw(positive, empty, latent, 1000 * seed + digit)
            pictures.append(self._host.decode_image(self._vae, drawn["samples"]))
        return torch.cat(pictures), torch.arange(len(digits.WORDS)).repeat_interleave(each)

    def _encoded(self, caption: str) -> Any:
        """CONDITIONING of a caption, encoded once."""
        if caption not in self._known:
            self._known[caption] = self._host.encode_text(self._clip, caption)
        return self._known[caption]

    def straightness(self, model: Any, cfg: float, steps: int, seed: int, count: int) -> dict[str, float]:
        """E|(x_data - x_noise) - velocity|² along a model's own paths, the mean over the digits.

        Args:
            model: to sample.
            cfg: guidance.
            steps: of each path.
            seed, count: see `drawn`.
        """
        measure, found = NODE_CLASS_MAPPINGS["Diff2FlowStraightness"]().measure, []

        def draw(positive: Any, negative: Any, latent: Any, number: int) -> Any:
            mean, relative, _, _, drawn = measure(model, positive, negative, latent, number, cfg, steps)
            found.append((mean, relative))
            return drawn

        self.drawn(draw, seed, count)
        means, relatives = zip(*found, strict=True)
        return {"mean": statistics.fmean(means), "relative": statistics.fmean(relatives)}

    def drawn_together(self, draw: Draw, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """As `drawn`, all digits in calls of up to 50 samples, which is faster; other noise than there.

        Args:
            draw: draws them.
            seed: 1000 seed + the number of the call is that of its noise.
            count: a multiple of 10.
        """
        wanted, pictures = torch.arange(len(digits.WORDS)).repeat_interleave(count // len(digits.WORDS)), []
        empty = self._encoded("")
        contexts = [self._encoded(digits.caption(digit))[0] for digit in range(len(digits.WORDS))]
        for number, part in enumerate(wanted.split(_BATCH)):
            positive = [[torch.cat([contexts[digit][0] for digit in part.tolist()]), contexts[0][1]]]
            latent = {"samples": torch.zeros(len(part), 4, self._size // 8, self._size // 8)}
            drawn = draw(positive, empty, latent, 1000 * seed + number)
            pictures.append(self._host.decode_image(self._vae, drawn["samples"]))
        return torch.cat(pictures), wanted

    def judged(self, pictures: Tensor, wanted: Tensor) -> dict[str, float]:
        """accuracy: share read as the digit that was wanted; Fréchet distances in the classifier's features, in
        pixels.
        """
        return {
            "accuracy": float((classifier.classify(pictures) == wanted).float().mean()),
            "frechet_features": frechet_distance(classifier.features(pictures), classifier.features(self.real)),
            "frechet_pixels": frechet_distance(pixel_features(pictures), pixel_features(self.real)),
        }


def save_picture(pictures: Tensor, path: Path, rows: int = 2) -> None:
    """Some samples of each digit, a column each."""
    each = len(pictures) // len(digits.WORDS)
    lines = [torch.cat(list(pictures[i::each]), dim=1) for i in range(min(rows, each))]
    with written_whole(path) as temporary:
        digits.to_pil(torch.cat(lines).clamp(0, 1)).save(temporary, format="PNG")
