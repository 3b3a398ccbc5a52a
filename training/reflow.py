"""Makes reflow pairs: what is missing of them, in batches, each written as soon as that is worth a file."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..samplers.parameterization import FlowParameterization
from .buckets import Size
from .captions import EMBEDDING, named_inversions
from .choices import PAIR_DTYPES
from .dataset import context_key, encoded
from .encoding import Inversions, TextEncoder, settings_key, text_tensors
from .identity import WEIGHTS, Facts, digest_of, facts_of
from .images import named
from .metadata import VERSION
from .pair_dataset import PairDataset, image_sizes
from .pairs import PairStore, Run, Share
from .port import Backbone, Progress
from .prompts import Prompts
from .record import clock, failure_told
from .shards import ShardStore, Unsaved
from .teacher import BatchSize, Teacher, TeacherSettings

_LOG = logging.getLogger(__name__)
_FORMAT = 1
"""Part of the pairs' identity: raise it when pairs of the same settings come out differently."""
_INVERSIONS = "textual_inversions"
_CHANNELS, _PIXELS = 4, 8
_SHARD_PAIRS = 256
"""A shard is written when it has so many pairs, or when the next batch would end too late (`shards.Unsaved`)."""
_BATCH_SECONDS = 12.0
"""What a batch may take: what is on its way in it is lost at Cancel."""


@dataclass(frozen=True)
class PairSettings:
    """What pairs are made.

    Args:
        count: of the pairs, over all shares.
        seed: of noises and wildcards.
        teacher: steps, guidance and solver.
        negative: prompt of the unconditional side.
        size: (width, height) of the images, pixels, multiples of 8.
        dtype: of the saved latents and text embeddings, of PAIR_DTYPES.
        batch_size: pairs in one network call; 0 for what fits.
        share: the part that is made here.
        damaged: see `PairStore`.

    Raises:
        ValueError: a value out of its range.
    """

    count: int
    seed: int = 0
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    negative: str = ""
    size: Size = (512, 512)
    dtype: str = "fp16"
    batch_size: int = 0
    share: Share = field(default_factory=Share)
    damaged: str = "skip"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, not {self.count}; 1000 to 100000 is usual")
        if self.dtype not in PAIR_DTYPES:
            raise ValueError(f"save_dtype must be one of {', '.join(PAIR_DTYPES)}, not {self.dtype!r}")
        if self.batch_size < 0:
            raise ValueError(f"batch_size must be at least 0, not {self.batch_size}; 0 takes what fits")
        for name, side in zip(("width", "height"), self.size, strict=True):
            if side < _PIXELS or side % _PIXELS:
                raise ValueError(f"{name} must be a multiple of 8 px, not {side}; 512 for SD1.x, 1024 for SDXL")


@dataclass(frozen=True)
class Maker:
    """What pairs are made by.

    Args:
        network: opens the teacher's network; entered only where a pair is missing.
        flow: that the teacher is sampled along.
        model_id, text_id: `identity.Identity` of the model, with everything patched in, and of the text encoder.
        encode: the text encoder.
        loras: metadata of the LoRAs that are applied, for the manifest.
        inversions: knows the files of textual inversions that prompts name.
    """

    network: Callable[[], AbstractContextManager[Backbone]]
    flow: FlowParameterization
    model_id: str
    text_id: str
    encode: TextEncoder
    loras: Sequence[Mapping[str, str]] = ()
    inversions: Inversions = lambda names: {}


def reflow_pairs(
    folder: Path, prompts: Prompts, maker: Maker, settings: PairSettings, progress: Callable[[int, str], Progress]
) -> PairDataset:
    """The pairs of a folder; those of this share that are missing are made first.

    Whatever ends it early, the pairs that are finished are written before the exception goes on.

    Args:
        folder: of the pairs; what is there already is not made again.
        prompts: of the pairs.
        maker: teacher and text encoder.
        settings: which pairs.
        progress: makes a bar for a total and a title.

    Raises:
        ValueError: the folder holds pairs made with other settings, or damaged ones where that is refused; an encoding
            that is not finite.
        NonFiniteStateError: the teacher's latents are NaN or infinite.
    """
    mode = torch.is_inference_mode_enabled()

    def encode(caption: str) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode(mode):
            return maker.encode(caption)

    # ComfyUI runs every node under inference mode, whose tensors could not be changed in the network's context.
    with torch.inference_mode(False), torch.no_grad():
        return _made(folder, prompts, replace(maker, encode=encode), settings, progress)


def _made(
    folder: Path, prompts: Prompts, maker: Maker, settings: PairSettings, progress: Callable[[int, str], Progress]
) -> PairDataset:
    identity, facts = pair_identity(prompts, maker, settings), _facts(prompts, maker)
    store = PairStore(folder, identity, settings.seed, settings.count, settings.damaged, facts)
    files = identity.get(_INVERSIONS)
    text_id = digest_of([maker.text_id, files]) if files else maker.text_id
    texts = ShardStore(folder / f"texts-{settings_key(text_id)}-{settings.dtype}")
    missing = store.missing(settings.share)
    with store.lock(settings.share) if len(missing) else nullcontext():
        _make(store, texts, missing, prompts, maker, settings, progress)
    notes = _notes(store, settings)
    return PairDataset(folder.name, store, texts, store.present, settings.size, notes, maker.text_id)


def _make(
    store: PairStore,
    texts: ShardStore,
    missing: Tensor,
    prompts: Prompts,
    maker: Maker,
    settings: PairSettings,
    progress: Callable[[int, str], Progress],
) -> None:
    """Encodes what the pairs need and makes those that are missing."""
    folder = store.folder
    wanted = (prompts.at(pair, settings.seed) for pair in missing.tolist())
    captions = itertools.chain(["", settings.negative], wanted, store.captions())
    total, title = 2 + len(missing) + len(store.present), f"Encoding prompts of {folder.name}"
    _encode(texts, captions, maker.encode, PAIR_DTYPES[settings.dtype], lambda: progress(total, title))
    if len(missing):
        bar = progress(len(missing), f"Making pairs of {folder.name}")
        with closing(bar), failure_told(bar), maker.network() as backbone:
            store.write_manifest(_about(backbone, maker))
            store.tidy(settings.share)
            making = _Making(store, texts, prompts, settings, Teacher(backbone, maker.flow, settings.teacher), bar)
            making.run(missing, BatchSize(settings.batch_size, backbone.device, _BATCH_SECONDS))


def pair_identity(prompts: Prompts, maker: Maker, settings: PairSettings) -> dict[str, Any]:
    """Everything that pair k depends on beside k, as JSON values."""
    flow, teacher = maker.flow, settings.teacher
    negative = settings.negative if teacher.is_guided else ""
    names = named_inversions([*prompts.templates(), negative])
    found = {f"{EMBEDDING}{name}": file for name, file in (maker.inversions(names) if names else {}).items()}
    return {
        **({_INVERSIONS: found} if found else {}),
        "format": _FORMAT,
        "model": maker.model_id,
        "text_encoder": maker.text_id,
        "prediction": flow.alignment.prediction,
        "schedule": flow.alignment.schedule.describe(),
        "start": flow.start,
        "shift": flow.shift,
        "solver": teacher.solver,
        "steps": teacher.steps,
        "cfg": teacher.cfg,
        "negative": negative,
        "seed": settings.seed,
        "prompts": prompts.digest(),
        "width": settings.size[0],
        "height": settings.size[1],
        "save_dtype": settings.dtype,
    }


def _facts(prompts: Prompts, maker: Maker) -> dict[str, Facts]:
    """What the digests in `pair_identity` are made of, in words."""
    return {
        "model": {"model": facts_of(maker.model_id)},
        "text_encoder": {"text encoder": facts_of(maker.text_id)},
        "prompts": {"list of prompts": {WEIGHTS: prompts.digest()}},
    }


class _Making:
    """One sitting of making pairs."""

    def __init__(
        self,
        store: PairStore,
        texts: ShardStore,
        prompts: Prompts,
        settings: PairSettings,
        teacher: Teacher,
        progress: Progress,
    ) -> None:
        self._store, self._texts, self._prompts, self._settings = store, texts, prompts, settings
        self._teacher, self._progress = teacher, progress
        self._pending: list[tuple[int, str, Tensor]] = []
        self._done = self._total = self._steps = 0
        self._began = time.monotonic()

    def run(self, pairs: Tensor, size: BatchSize) -> None:
        """Makes the pairs (N,), in their order; writes what is finished however it ends."""
        self._total, self._began = len(pairs), time.monotonic()
        unsaved = Unsaved()
        try:
            while self._done < self._total:
                self._done += size.run(lambda most: self._batch(pairs[self._done : self._done + most].tolist(), size))
                if len(self._pending) >= _SHARD_PAIRS or unsaved.is_due(size.expected):
                    self._flush()
                    unsaved = Unsaved()
        finally:
            self._flush()
        self._tell()

    def _batch(self, pairs: Sequence[int], size: BatchSize) -> int:
        """Makes pairs, all in one batch; how many.

        Those whose captions have one length go through the teacher together, and are finished with it. A caption keeps
        its own length, whatever else is in the batch: a pair depends on its number alone, and is what ComfyUI's
        sampler makes of its caption.
        """
        groups, total = self._groups(pairs), self._settings.teacher.steps * len(pairs)
        done = 0
        for group in groups:
            ahead, steps = done, itertools.count(1)

            def stepped(ahead: int = ahead, steps: Iterator[int] = steps, count: int = len(group)) -> None:
                self._steps += 1
                self._tell()
                size.require_in_time(len(pairs), min(1.0, (ahead + next(steps) * count) / total))

            latents = self._taught(group, stepped).to(PAIR_DTYPES[self._settings.dtype])
            self._pending += [(pair, caption, latent) for (pair, caption), latent in zip(group, latents, strict=True)]
            done += self._settings.teacher.steps * len(group)
        return len(pairs)

    def _groups(self, pairs: Sequence[int]) -> list[list[tuple[int, str]]]:
        """Pairs with their captions, those of one length together; without those of a batch that was given up on its
        way after they were finished."""
        finished = {pair for pair, _, _ in self._pending}
        groups: dict[int, list[tuple[int, str]]] = {}
        for pair in pairs:
            if pair not in finished and pair not in self._store:
                caption = self._prompts.at(pair, self._settings.seed)
                groups.setdefault(self._texts.shape(context_key(caption))[1], []).append((pair, caption))
        return list(groups.values())

    def _taught(self, group: Sequence[tuple[int, str]], stepped: Callable[[], None]) -> Tensor:
        """Latents (B, C, h, w) of pairs whose captions have one length."""
        settings, count = self._settings, len(group)
        context, pooled = self._conditions([caption for _, caption in group])
        width, height = settings.size
        shape = (_CHANNELS, height // _PIXELS, width // _PIXELS)
        noise = torch.stack([self._store.noise(shape, pair) for pair, _ in group])
        sizes = image_sizes(settings.size).expand(2 * count if settings.teacher.is_guided else count, -1)
        return self._teacher(noise, context, pooled, sizes, stepped)

    def _conditions(self, captions: Sequence[str]) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        """Contexts and pooled outputs as `Teacher` takes them."""
        positive, pooled = encoded(self._texts, captions)
        if not self._settings.teacher.is_guided:
            return positive, pooled
        negative, other = encoded(self._texts, [self._settings.negative] * len(captions))
        both = None if pooled is None or other is None else torch.cat([pooled, other])
        if positive.shape[1] == negative.shape[1]:
            return torch.cat([positive, negative]), both
        return (positive, negative), both

    def _tell(self) -> None:
        """Pairs made, teacher's steps a second and seconds left: on the bar and on the page."""
        seconds = max(1e-9, time.monotonic() - self._began)
        rate, left = self._steps / seconds, None
        if self._done:
            left = seconds / self._done * (self._total - self._done)
        entry = {"kind": "pairs", "done": self._done, "total": self._total}
        self._progress.event({**entry, "steps_per_second": rate, "seconds_left": left})
        remaining = "" if left is None else f", {clock(left)} left"
        self._progress.update(self._done, f"{self._done} of {self._total} pairs, {rate:.2f} it/s{remaining}")

    def _flush(self) -> None:
        """Writes what is finished, a shard for each run of pairs that follow each other."""
        for run in _runs(sorted(self._pending, key=lambda made: made[0]), self._settings.share.of):
            self._store.write(run, self._settings.share)
        self._pending = []


def _runs(pending: Sequence[tuple[int, str, Tensor]], stride: int) -> Iterator[Run]:
    begin = 0
    for end in range(1, len(pending) + 1):
        if end == len(pending) or pending[end][0] != pending[end - 1][0] + stride:
            part = pending[begin:end]
            yield Run(part[0][0], stride, tuple(c for _, c, _ in part), torch.stack([latent for _, _, latent in part]))
            begin = end


def _encode(
    texts: ShardStore,
    captions: Iterator[str],
    encode: TextEncoder,
    dtype: torch.dtype,
    make: Callable[[], Progress],
) -> None:
    """Encodes the captions that are not in the store; what is done stays if it is interrupted."""
    progress: Progress | None = None
    try:
        for number, caption in enumerate(captions):
            if context_key(caption) in texts:
                continue
            progress = progress or make()
            context, pooled = encode(caption)
            tensors = text_tensors(caption, context.to(dtype), None if pooled is None else pooled.to(dtype))
            texts.add({key: tensor.to(dtype) for key, tensor in tensors.items()})
            progress.update(number + 1, caption)
    finally:
        texts.flush()
        if progress is not None:
            progress.close()


def _about(backbone: Backbone, maker: Maker) -> dict[str, Any]:
    """What the manifest says beside the identity."""
    import safetensors

    kept = ("modelspec.title", "diff2flow.")
    return {
        "teacher": backbone.base_name,
        "teacher_sha256": backbone.base_hash,
        "family": backbone.family,
        "loras": [{k: v for k, v in lora.items() if k.startswith(kept)} for lora in maker.loras],
        "versions": {"diff2flow": VERSION, "torch": torch.__version__, "safetensors": safetensors.__version__},
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _notes(store: PairStore, settings: PairSettings) -> tuple[str, ...]:
    teacher = settings.teacher
    notes = [f"the teacher's {teacher.solver}, {teacher.steps} steps, CFG {teacher.cfg:g}, seed {settings.seed}"]
    if missing := store.count - len(store.present):
        notes.append(f"{missing} of {store.count} pairs are missing: other shards make them, copy them into the folder")
    if store.damaged:
        reasons = [f"{name} ({why})" for name, why in store.damaged.items()]
        notes.append(f"{len(reasons)} damaged shards skipped: {named(reasons)}")
    return tuple(notes)
