"""Reflow pairs on disk: shards that any number of machines may add to, and an index of which pair is where.

A pair is a noise and the latent that the teacher makes of it. Pair k is a function of what the manifest says and of k:
its noise is drawn by `pair_noise` and not stored, only a few of its values, by which a reader knows it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole
from . import draws
from .checkpoint_file import write_tensors
from .choices import DAMAGED
from .identity import Facts, all_differences
from .images import named
from .lock import Lock
from .manifest import VERSION, parsed
from .records import Records
from .shard_file import ShardFile
from .shards import DIGEST, content_digest, kept_open, require_whole

_LOG = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_PATTERN = "pairs-*.safetensors"
_VERSION = 1
_IDENTITY, _FACTS = "identity", "facts"
_PROBE = 8


@dataclass(frozen=True)
class Share:
    """The part of the pairs that one machine makes: k = number - 1, number - 1 + of, ...

    Raises:
        ValueError: number is not from 1 to of.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(
                f"shard must be from 1 to shards ({self.of}), not {self.number}: each machine takes another number"
            )


@dataclass(frozen=True)
class Run:
    """Pairs k, k + stride, k + 2 stride, ... that lie in one shard, in this order.

    Args:
        captions: of each.
        latents: (B, C, h, w), in the autoencoder's scale.
    """

    first: int
    stride: int
    captions: tuple[str, ...]
    latents: Tensor


def pair_noise(shape: Sequence[int], seed: int, pair: int) -> Tensor:
    """x_noise of a pair, standard normal float32 of shape (C, h, w)."""
    return torch.randn(*shape, generator=draws.generator(seed, "pair", pair))


class PairStore:
    """The shards of a folder and its subfolders, as far as their pairs are below `count`.

    Every shard is checked in full when it is first seen, by header and SHA-256; one that was cut short, altered, or
    made with other settings is named and, by choice, skipped, so that its pairs count as missing. In memory a pair
    takes 8 bytes.

    Args:
        folder: of the shards; made when first written to.
        identity: what pairs are made with, JSON values; written to the manifest.
        seed: of the noise.
        count: pairs that are wanted.
        damaged: "skip" or "refuse".
        facts: what digests in the identity are made of, by their names there.

    Attributes:
        damaged: the shards that are, and why.

    Raises:
        ValueError: the folder holds pairs made with other settings; a damaged shard where that is refused.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        seed: int,
        count: int,
        damaged: str = "skip",
        facts: Mapping[str, Facts] | None = None,
    ) -> None:
        if damaged not in DAMAGED:
            raise ValueError(f"damaged must be one of {', '.join(DAMAGED)}, not {damaged!r}")
        self.folder, self.count, self._seed, self._identity = folder, count, seed, dict(identity)
        self.identity_digest, self._facts = _digest(identity), facts or {}
        _require_same(folder, self._identity, self._facts)
        self._paths: list[Path] = []
        self._shard = torch.full((count,), -1, dtype=torch.int32)
        self._row = torch.zeros(count, dtype=torch.int32)
        self._open: OrderedDict[Path, _Opened] = OrderedDict()
        self._verified: set[Path] = set()
        self._records = Records(folder / "verified.json")
        self.damaged: dict[str, str] = {}
        self._index()
        if self.damaged and damaged == "refuse":
            reasons = [f"{name} ({why})" for name, why in self.damaged.items()]
            raise ValueError(
                f"damaged is 'refuse' and {len(reasons)} shards in '{folder.name}' cannot be used: {named(reasons)};"
                " copy them again, or delete them, or set damaged to 'skip': their pairs are then made again"
            )

    @property
    def present(self) -> Tensor:
        """Numbers of the pairs that there are (N,) int64, ascending."""
        return torch.nonzero(self._shard >= 0).squeeze(1)

    def __contains__(self, pair: int) -> bool:
        return bool(self._shard[pair] >= 0)

    def missing(self, share: Share) -> Tensor:
        """Numbers of a share's pairs that there are not (N,) int64, ascending."""
        own = torch.arange(share.number - 1, self.count, share.of)
        return own[self._shard[own] < 0]

    def write_manifest(self, about: Mapping[str, Any]) -> None:
        """Writes what the pairs are made with, and what else is known of it; a manifest that is there stays."""
        if not (self.folder / MANIFEST).exists():
            known = {VERSION: _VERSION, _IDENTITY: self._identity, _FACTS: self._facts}
            text = json.dumps({**known, "about": dict(about)}, indent=1)
            with written_whole(self.folder / MANIFEST) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def lock(self, share: Share) -> Lock:
        """Keeps others from making the same share, until it is closed; ValueError where another makes it."""
        return Lock(
            self.folder / f".lock-{share.number:04d}of{share.of:04d}",
            f"folder: shard {share.number} of {share.of} of the pairs in '{self.folder.name}' is made",
            "wait until it has ended, or give each machine another number in shard",
        )

    def tidy(self, share: Share) -> None:
        """Removes what a process that was killed left of shards of a share that it was writing."""
        for part in self.folder.glob(f".{self._prefix(share)}*.part"):
            part.unlink(missing_ok=True)

    def write(self, run: Run, share: Share) -> None:
        """Writes pairs as a shard, whole or not at all."""
        shape, count = tuple(run.latents.shape[1:]), len(run.captions)
        probes = [self.noise(shape, run.first + i * run.stride).flatten()[:_PROBE] for i in range(count)]
        tensors = {
            "captions": torch.frombuffer(bytearray(json.dumps(run.captions).encode()), dtype=torch.uint8),
            "latents": run.latents.contiguous(),
            "noise_begins": torch.stack(probes),
            "pairs": torch.tensor([run.first, run.stride, count]),
        }
        name = f"{self._prefix(share)}{run.first:09d}.safetensors"
        metadata = {DIGEST: content_digest(sorted(tensors.items())), _IDENTITY: self.identity_digest}
        write_tensors(self.folder / name, tensors, metadata)
        self._forget(self.folder / name)
        self._verified.add(self.folder / name)
        self._take(self.folder / name, run.first, run.stride, count)

    def latent(self, pair: int) -> Tensor:
        """(1, C, h, w) of a pair, in the autoencoder's scale, float32.

        Raises:
            KeyError: there is no such pair.
            ValueError: its shard was damaged or removed meanwhile.
        """
        row = int(self._row[pair])
        return self._opened(pair).latent(row)

    def caption(self, pair: int) -> str:
        """The caption of a pair; raises as `latent`."""
        return self._opened(pair).captions[int(self._row[pair])]

    def noise_of(self, pair: int) -> Tensor:
        """x_noise (C, h, w) of a pair, as the teacher began with it; raises as `latent`.

        Raises:
            ValueError: this machine's random numbers are not those that the pair was made with.
        """
        opened = self._opened(pair)
        noise = self.noise(opened.shape, pair)
        if not torch.allclose(noise.flatten()[:_PROBE], opened.probes[int(self._row[pair])], atol=1e-4):
            raise ValueError(
                f"dataset: the noise of pair {pair} cannot be drawn again (this torch, {torch.__version__}, draws other"
                f" numbers than the one that made '{self.folder.name}'); use that version, see its {MANIFEST}"
            )
        return noise

    def noise(self, shape: Sequence[int], pair: int) -> Tensor:
        """x_noise of a pair that may not be there yet."""
        return pair_noise(shape, self._seed, pair)

    def captions(self) -> Iterator[str]:
        """The captions of all shards that hold a pair, without keeping them."""
        for number in self._shard[self._shard >= 0].unique().tolist():
            yield from _Opened(self._paths[number]).captions

    def nbytes(self) -> int:
        """Bytes of the index."""
        return self._shard.nbytes + self._row.nbytes

    def _index(self) -> None:
        for path in sorted(self.folder.rglob(_PATTERN)):
            name = path.relative_to(self.folder).as_posix()
            try:
                identity, first, stride, count = self._records.of(path, name, self._verify, _are_facts)
                self._require_own(identity)
            except Exception as error:  # safetensors raises its own type; whatever it is, the shard is not used
                self.damaged[name] = " ".join(str(error).split())
                _LOG.warning("The shard %s is damaged and not used: %s", path, error)
            else:
                self._take(path, first, stride, count)
        if self._paths:
            self._records.save()

    def _take(self, path: Path, first: int, stride: int, count: int) -> None:
        """Notes where the pairs of a shard are; a pair that is in another shard already stays there."""
        self._paths.append(path)
        below = max(0, -((first - self.count) // stride))
        rows = torch.arange(min(count, below), dtype=torch.int32)
        pairs = first + stride * rows.long()
        wanted = pairs < self.count
        pairs, rows = pairs[wanted], rows[wanted]
        new = self._shard[pairs] < 0
        self._shard[pairs[new]], self._row[pairs[new]] = len(self._paths) - 1, rows[new]

    def _forget(self, path: Path) -> None:
        """A shard of that name was there and damaged: it is replaced."""
        self.damaged.pop(path.name, None)

    def _prefix(self, share: Share) -> str:
        """Of the names of a share's shards: no other machine, and no other settings, write under the same."""
        return f"pairs-{self.identity_digest[:8]}-{share.number:04d}of{share.of:04d}-"

    def _require_own(self, identity: str) -> None:
        if identity != self.identity_digest:
            raise ValueError("it was made with other settings, or by another model")

    def _opened(self, pair: int) -> _Opened:
        number = int(self._shard[pair])
        if number < 0:
            raise KeyError(pair)
        return kept_open(self._open, self._paths[number], self._opened_first)

    def _opened_first(self, path: Path) -> _Opened:
        try:
            if path not in self._verified:
                self._verify(path)
            return _Opened(path)
        except Exception as error:
            raise ValueError(
                f"dataset: the shard {path.name} in '{self.folder.name}' was damaged or removed since the pairs were"
                f" loaded ({error}); run Diff2Flow Reflow Pairs again (in ComfyUI after a restart): it makes the pairs"
                " of that shard anew"
            ) from error

    def _verify(self, path: Path) -> list[Any]:
        """Identity, first pair, stride and number of pairs of a shard that is whole."""
        require_whole(path)
        opened = _Opened(path)
        self._verified.add(path)
        return [opened.identity, *opened.numbers]


class _Opened:
    """A shard being read: latents lazily, the rest at once."""

    def __init__(self, path: Path) -> None:
        self._file = ShardFile(path)
        self.identity = self._file.metadata.get(_IDENTITY, "")
        self.numbers: list[int] = self._file.tensor("pairs").tolist()
        self.captions: list[str] = json.loads(self._file.tensor("captions").numpy().tobytes())
        self.probes = self._file.tensor("noise_begins")
        self.shape = self._file.shape("latents")[1:]
        self._require_one_count()

    def _require_one_count(self) -> None:
        """ValueError where the parts of the shard do not fit together."""
        facts, latents = [self.identity, *self.numbers], self._file.shape("latents")
        if not _are_facts(facts) or len(latents) != 4 or not self._file.is_floating("latents"):
            raise ValueError(f"its numbers {self.numbers} or its latents {latents} are of another form")
        texts = isinstance(self.captions, list) and all(isinstance(caption, str) for caption in self.captions)
        probes = self.probes.shape == (latents[0], min(_PROBE, math.prod(self.shape)))
        if not texts or not probes or not len(self.captions) == latents[0] == self.numbers[2]:
            raise ValueError(f"its captions, noises and latents are not those of {self.numbers[2]} pairs")

    def latent(self, row: int) -> Tensor:
        """The latent (1, C, H, W) of a row, float32."""
        return self._file.row("latents", row)[None].float()


def _are_facts(found: object) -> bool:
    """Whether this is what is recorded of a shard: identity, first pair, stride and number of pairs."""
    if not isinstance(found, list) or [type(value) for value in found] != [str, int, int, int]:
        return False
    return found[1] >= 0 and found[2] >= 1 and found[3] >= 1


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _require_same(folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Facts]) -> None:
    """ValueError if the folder's manifest names other settings than these."""
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        about = parsed(path.read_text(encoding="utf-8"), _VERSION, {_IDENTITY: dict})
        known = about[_IDENTITY]
    except Exception as error:
        raise ValueError(
            f"folder: the manifest '{folder.name}/{MANIFEST}' cannot be read ({error}); delete it (the shards know what"
            " they were made with), or give another folder"
        ) from error
    if found := all_differences(known, identity, about.get(_FACTS, {}), facts):
        raise ValueError(
            f"folder: '{folder.name}' holds pairs made with other settings ({'; '.join(found)}); give another folder"
            " name, or set everything as it was to go on with these"
        )
