"""Synthetic scenes as what a tiny prior is trained on; its autoencoder also learns their depth, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..depth.codec import encode
from ..depth.metrics import depth_metrics, fitted
from . import scenes, tiny_taesd
from .kept import kept
from .scene_plan import plan
from .subjects import some_empty, text_encoder

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

TRAINED_SEED, HELD_OUT_SEED = 0, 1_000_000
"""Seeds of the scenes that the prior is trained on, and of those that it is measured on."""
_PART, _DEPTH_SHARE, _MEASURED = 250, 3, 64
_LEVELS = 255.0


def depth_pictures(depth: Tensor) -> Tensor:
    """Depth (B, H, W), metres, above 0, drawn as grey pictures (B, H, W, 3) in [0, 1]: near black, far white."""
    return (encode(depth, torch.ones_like(depth, dtype=torch.bool)).picture + 1.0) / 2.0


def abs_rel(drawn: Tensor, depth: Tensor) -> float:
    """AbsRel of values (B, H, W) that know depth up to scale and shift of its logarithm."""
    return depth_metrics(fitted(drawn, depth, None, "log"), depth)["abs_rel"]


class SceneSubject:
    """Scenes with their captions.

    Args:
        count: how many scenes; drawn once and kept in the work folder.
        captions: how many different captions are learned, unless the first solids alone are more. A scene whose
            caption comes later is called by its first solid, which is true of it as well.
        work: folder for what can be used again after an interruption.
        key: what the files there belong to.
    """

    def __init__(self, count: int, captions: int, work: Path, key: str) -> None:
        self._count, self._most, self._work, self._key = count, captions, Path(work), key
        self._texts, self._labels = self._named()

    @property
    def labels(self) -> Tensor:
        """(N,), which caption each picture has."""
        return self._labels

    def pictures(self) -> Iterator[Tensor]:
        """All scenes, batches (B, 64, 64, 3) in [0, 1]."""
        for part in self._drawn["pictures"].split(_PART):
            yield part / _LEVELS

    def shown(self, count: int, random: torch.Generator) -> tuple[Tensor, int]:
        """Scenes, and for the last third the depth of others."""
        chosen = torch.randint(0, self._count, (count,), generator=random)
        plain = count - count // _DEPTH_SHARE
        pictures, depths = (self._drawn[name] for name in ("pictures", "depths"))
        grey = (depths[chosen[plain:]] / _LEVELS)[..., None].expand(-1, -1, -1, 3)
        return torch.cat([pictures[chosen[:plain]] / _LEVELS, grey]), plain

    def captions(self, text: Mapping[str, Tensor]) -> SceneCaptions:
        """Each different caption is encoded once."""

        def encoded() -> dict[str, Tensor]:
            from tqdm import tqdm

            encoder = text_encoder(text)
            texts = tqdm(["", *self._texts], desc="captions", mininterval=5.0)
            return {"contexts": torch.cat([encoder.encode(text)[0][0].half() for text in texts])}

        contexts = self._kept("captions", encoded)["contexts"]
        return SceneCaptions(contexts[1:], contexts[:1].float())

    def measured(self, autoencoder: AutoencoderTiny) -> dict[str, float]:
        """On scenes that nothing is trained on.

        "picture_error": mean absolute error of pictures in [0, 1] that were encoded and decoded. "depth_absrel": AbsRel
        of depth drawn as pictures, encoded, decoded and aligned: no depth model on this autoencoder does better.
        "constant_absrel": AbsRel of one value for all pixels, for scale.
        """
        made = scenes.scenes(range(_MEASURED), HELD_OUT_SEED)
        again, drawn = (
            tiny_taesd.decode(autoencoder, tiny_taesd.encode(autoencoder, pictures))
            for pictures in (made.pictures, depth_pictures(made.depth))
        )
        return {
            "picture_error": float((again - made.pictures).abs().mean()),
            "depth_absrel": abs_rel(drawn.mean(dim=-1), made.depth),
            "constant_absrel": abs_rel(torch.zeros_like(made.depth), made.depth),
        }

    def _named(self) -> tuple[list[str], Tensor]:
        """The different captions, and each scene's."""
        plans = [plan(index, TRAINED_SEED) for index in range(self._count)]
        numbers: dict[str, int] = {}
        for scene in plans:
            numbers.setdefault(scene.solids[0].name, len(numbers))
        labels = []
        for scene in plans:
            if len(numbers) < self._most:
                numbers.setdefault(scene.caption, len(numbers))
            labels.append(numbers.get(scene.caption, numbers[scene.solids[0].name]))
        return list(numbers), torch.tensor(labels)

    @cached_property
    def _drawn(self) -> dict[str, Tensor]:
        """Pictures (N, 64, 64, 3) and depth pictures (N, 64, 64), 8 bit."""
        return self._kept("scenes", self._draw)

    def _draw(self) -> dict[str, Tensor]:
        from tqdm import tqdm

        parts: dict[str, list[Tensor]] = {"pictures": [], "depths": []}
        for first in tqdm(range(0, self._count, _PART), desc="scenes", unit_scale=_PART):
            made = scenes.scenes(range(first, min(first + _PART, self._count)), TRAINED_SEED)
            for name, values in (("pictures", made.pictures), ("depths", depth_pictures(made.depth)[..., 0])):
                parts[name].append((values * _LEVELS).round().to(torch.uint8))
        return {name: torch.cat(values) for name, values in parts.items()}

    def _kept(self, name: str, made: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the work folder's file has, if it belongs to the key; made and written otherwise."""
        return kept(self._work / f"{name}.safetensors", self._key, made)


class SceneCaptions:
    """The embeddings of scenes' captions.

    Args:
        contexts: (K, 77, 768), float16.
        empty: (1, 77, 768).
    """

    def __init__(self, contexts: Tensor, empty: Tensor) -> None:
        self.contexts, self.empty = contexts, empty

    def drawn(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """A caption's embedding (B, 77, 768) for each label (B,); a tenth are empty."""
        return some_empty(self.contexts[labels].float(), self.empty, random)
