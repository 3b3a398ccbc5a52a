"""One finetuning, from a network and a dataset to a file, with everything on the way: states, samples, validation."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import DiskFullError, require_writable
from ..samplers.parameterization import FlowParameterization
from .adapters import Trained, trainable
from .checkpointing import checkpointed
from .choices import DTYPES
from .fit import inputs_of, require_fit, require_suited
from .identity import Facts, facts_of
from .insertion import float32_network
from .layers import LoraSettings
from .loop import Loop, MicroBatch, StepReport, autocast_dtype
from .lora_file import free_path
from .memory import estimate, is_out_of_memory, memory_of, require_room
from .metadata import Run, lora_metadata
from .pair_dataset import PairDataset
from .pair_distances import without_worst
from .parallel import Processes, joined
from .port import Backbone, Progress, TextBackbone, TrainingDataset
from .product import Finetuned, Output, save_product
from .record import LOG, Events, JsonLines, Sink, TensorBoard, clock, failure_told
from .run_folder import RunFolder, open_run
from .sample_files import save_samples
from .settings import TrainSettings
from .signals import delayed, ignored
from .validation import Validation

_LOG = logging.getLogger(__name__)
_RECENT, _SHOWN = 20, 500

Draw = Callable[[Any, FlowParameterization, "TextBackbone | None"], "list[tuple[str, Tensor]]"]
"""Samples of a MODEL along a flow, with the text encoders in training: pairs of a short title and an IMAGE."""


@dataclass(frozen=True)
class Watch:
    """What is looked at while training.

    Args:
        sample_every: steps between samples; 0 draws none.
        draw: draws them.
        validate_every: steps between validations; 0 makes none.
        held_out: what is validated on.
        tensorboard: event files as well.
    """

    sample_every: int = 0
    draw: Draw | None = None
    validate_every: int = 0
    held_out: TrainingDataset | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class Keeping:
    """What is kept on disk while training.

    Args:
        root: folder of all runs.
        save_every: steps between saved states; 0 saves one only when the run ends, however it ends.
        keep: states, at least 1.
        resume: "auto" or "new", see `run_folder.open_run`.
        memory_check: whether a run that does not fit is refused.

    Raises:
        ValueError: a number out of range.
    """

    root: Path
    save_every: int = 250
    keep: int = 2
    resume: str = "auto"
    memory_check: bool = True

    def __post_init__(self) -> None:
        if self.save_every < 0:
            raise ValueError(f"save_every must be at least 0, not {self.save_every}; 250 is usual")
        if self.keep < 1:
            raise ValueError(f"keep_states must be at least 1, not {self.keep}")


@dataclass(frozen=True)
class Job:
    """All that a finetuning is.

    Args:
        backbone, dataset, lora, settings: what is trained, on what, which layers, how.
        output: the file it becomes.
        keeping: what is kept while it runs.
        watch: what is looked at.
        model_id, encoder_id: `identity.Identity` of the model, and of the text encoder where it is trained, with
            everything that is patched in already.
    """

    backbone: Backbone
    dataset: TrainingDataset
    lora: LoraSettings
    settings: TrainSettings
    output: Output
    keeping: Keeping
    watch: Watch = field(default_factory=Watch)
    model_id: str = ""
    encoder_id: str = ""

    def identity(self) -> dict[str, Any]:
        """What must be equal for a saved state to be continued."""
        ids = "/".join(filter(None, (self.model_id, self.encoder_id)))
        model = {"model": ids, "prediction": self.backbone.prediction}
        made = {"lora": asdict(self.lora), "settings": self.settings.identity()}
        return {**model, "dataset": self.dataset.identity(), **made}

    def facts(self) -> dict[str, Facts]:
        """What the digests in `identity` are made of, in words."""
        model = {"model": facts_of(self.model_id)}
        if self.encoder_id:
            model["text encoder in training"] = facts_of(self.encoder_id)
        return {"model": model, "dataset": self.dataset.facts()}


def finetune(job: Job, progress: Progress) -> Finetuned:
    """Trains and saves. Whatever ends the run early, its state and its product are saved before the exception goes on.

    The network is afterwards what it was.

    Raises:
        ValueError: dataset and network do not fit, no layer is chosen, not enough memory; see also `Loop`. Where steps
            were made before it, the message ends with the name of the file they are saved as.
    """
    # ComfyUI runs every node under inference mode: this is the one place that leaves it.
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        stack.callback(progress.close)
        stack.enter_context(failure_told(progress))
        for dataset in filter(None, (job.dataset, job.watch.held_out)):
            require_fit(job.backbone, dataset)
        require_suited(job.settings.objective, job.dataset, job.lora)
        inputs = inputs_of(job.dataset)
        processes = joined(job.backbone.device)
        with processes.writer_first():
            job = replace(job, dataset=_without_worst(job, progress))
        originals = memory_of(_networks(job))
        adapters = stack.enter_context(trainable(job.backbone, job.lora, job.settings.seed, inputs))
        if autocast_dtype(job.settings.optimizer.precision, job.backbone.device) is None:
            stack.enter_context(float32_network(job.backbone))
        stack.enter_context(checkpointed(job.backbone.module, job.settings.optimizer.checkpointing))
        folder = _opened(job, processes)
        stack.callback(folder.close)
        return _Session(job, folder, adapters, progress, processes, originals).run()


class _Session:
    """One sitting of a run: from its beginning or its last state to its end or its interruption."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        adapters: Trained,
        progress: Progress,
        processes: Processes,
        originals: Mapping[int, int],
    ) -> None:
        self._job, self._adapters, self._progress, self._processes = job, adapters, progress, processes
        self._folder, self._originals = folder, originals
        state = folder.resumed()
        self._loop = Loop(job.backbone, job.dataset, adapters, job.settings, processes, state)
        self._resumed_at = self._saved_at = self._loop.step
        self._began, self._timer = time.time(), time.monotonic()
        self._validation = _validation(job, self._loop)
        self._sinks: list[Sink] = []
        self._asked = ""

    def run(self) -> Finetuned:
        """Trains; saves the state and the product however it ends."""
        self._introduce()
        try:
            # Compiled only now: the estimate's tensors hold no memory that a compiled network could read.
            with self._recorded(), _compiled(self._job.backbone.module, self._job.settings.optimizer.compile):
                self._loop.run(self._report, self._due, self._pause, self._say)
        except BaseException as error:
            self._rescue(error)
            raise
        with delayed():
            return self._save()

    def _introduce(self) -> None:
        """Says what will be trained, and refuses what does not fit."""
        job = self._job
        text = self._adapters.describe
        if self._resumed_at:
            text += f"; continues after step {self._resumed_at}"
        self._progress.update(self._resumed_at, text)
        _LOG.info("%s: %s", job.output.name, text)
        if self._folder.note:
            _LOG.warning("%s: %s", job.output.name, self._folder.note)
        if not job.keeping.memory_check:
            return
        largest = self._largest()
        needed = estimate(_networks(job), job.settings, lambda: self._loop.loss(largest), self._originals)
        found = require_room(needed, job.backbone.device, job.settings)
        _LOG.info("%s: %s", job.output.name, found)

    def _largest(self) -> MicroBatch:
        """A micro-batch of the most pixels with the longest context, whether or not they occur in one item."""
        dataset = self._job.dataset
        micro = self._loop.micro_batch([dataset.largest] * self._job.settings.batch_size, 0)
        longest = dataset.batch([dataset.longest] * len(micro.batch.latent))
        text = {"context": longest.context, "pooled": longest.pooled, "captions": longest.captions}
        return replace(micro, batch=replace(micro.batch, **text))

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """The log, TensorBoard and the page hear of every step."""
        if self._processes.is_writer:
            self._sinks = [Events(self._progress), JsonLines(self._folder.path / LOG, self._resumed_at)]
            if self._job.watch.tensorboard:
                self._sinks.append(TensorBoard(self._folder.path / "tensorboard", self._resumed_at))
        begin = {"kind": "begin", "name": self._job.output.name, "step": self._loop.step}
        self._add({**begin, "steps": self._job.settings.steps})
        if self._folder.note:
            self._add({"kind": "note", "step": self._loop.step, "text": self._folder.note})
        if self._loop.losses:
            self._progress.event({"kind": "earlier", "step": self._loop.step, **_thinned(self._loop.losses)})
        try:
            yield
        finally:
            self._loop.settle_last(self._log)
            self._add({"kind": "end", "step": self._loop.step, "steps": self._job.settings.steps})
            for sink in self._sinks:
                sink.close()
            self._sinks = []

    def _phase(self, phase: str) -> None:
        """What takes a while now, for the page."""
        self._progress.event({"kind": "phase", "phase": phase, "step": self._loop.step})

    def _add(self, entry: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.add({**entry, "time": time.time()})

    def _log(self, step: StepReport) -> tuple[float, float]:
        """Into the log and to the page; steps a second and seconds left."""
        rate = (step.step - self._resumed_at) / max(1e-9, time.monotonic() - self._timer)
        left = (self._job.settings.steps - step.step) / rate
        numbers = {"loss": step.loss, "learning_rate": step.learning_rate, "grad_norm": step.grad_norm}
        self._add({"kind": "step", "step": step.step, **numbers, "steps_per_second": rate, "seconds_left": left})
        return rate, left

    def _report(self, step: StepReport) -> None:
        rate, left = self._log(step)
        recent = self._loop.losses[-_RECENT:]
        text = f"loss {sum(recent) / len(recent):.4f}, {rate:.2f} it/s, {clock(left)} left"
        self._progress.update(step.step, text)

    def _say(self, text: str) -> None:
        """Says what changes on the way."""
        _LOG.warning("%s: %s", self._job.output.name, text)
        self._progress.update(self._loop.step, text)

    def _due(self, step: int) -> bool:
        watch, keeping = self._job.watch, self._job.keeping
        if self._processes.count == 1:  # only the writer has a page: several processes would have to agree
            self._asked = self._progress.command() or self._asked
        regular = (watch.sample_every, watch.validate_every, keeping.save_every)
        return bool(self._asked) or any(every and step % every == 0 for every in regular)

    def _pause(self) -> bool:
        """Saves, validates and samples, as far as each is due or asked for; whether the run is to end here."""
        step, watch, keeping = self._loop.step, self._job.watch, self._job.keeping
        asked, self._asked = self._asked, ""
        if keeping.save_every and step % keeping.save_every == 0 and step < self._job.settings.steps:
            self._tell_failures(self._keep() if self._processes.is_writer else _Kept())
        if self._validation is not None and step % watch.validate_every == 0:
            self._phase("validating")
            with self._loop.product_in_place():
                self._add({"kind": "validation", "step": step, **self._validation.losses(self._job.backbone)})
        if watch.draw is not None and watch.sample_every and step % watch.sample_every == 0:
            self._sample(step)
        if asked == "save":
            self._save()
        return asked == "stop"

    def _sample(self, step: int) -> None:
        """Draws and saves samples, by the host's own sampler."""
        if not self._processes.is_writer:
            return
        self._phase("sampling")
        objective, watch = self._loop.objective, self._job.watch
        flow = FlowParameterization(objective.alignment, objective.start)
        try:
            with self._loop.product_in_place(), torch.no_grad(), self._job.backbone.sampled() as model:
                text = self._job.backbone.text if self._adapters.trains_text else None
                pictures = watch.draw(model, flow, text) if watch.draw else []
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._say(f"memory ran out while the samples of step {step} were drawn: left out; make them smaller")
            return
        try:
            saved, preview = save_samples(self._folder.path / "samples", step, pictures)
        except DiskFullError as error:
            self._say(f"the samples of step {step} are left out: {error}")
            return
        self._add({"kind": "samples", "step": step, "files": [path.name for path in saved]})
        self._progress.update(step, "samples saved", preview)

    def _save(self) -> Finetuned:
        """The product and the state of the steps that were made.

        Raises:
            ValueError: there is no product; says what there is.
        """
        kept = self._keep()
        if kept.result is None:
            raise ValueError(f"{kept.told}; queue again to go on from there") from kept.error
        self._tell_failures(kept)
        self._progress.event({"kind": "saved", "step": self._loop.step, "name": kept.result.name})
        return replace(kept.result, name=self._processes.told(kept.result.name))

    def _keep(self) -> _Kept:
        """The product first, then the state; where one cannot be saved, the other is."""
        self._phase("saving")
        kept, step = _Kept(), self._loop.step
        try:
            kept.result = self._saved_product()
            kept.facts.append(f"{step} steps are saved as '{kept.result.name}'")
        except Exception as error:  # whatever it is, the state is saved
            kept.failed(f"the {'checkpoint' if self._job.lora.full else 'LoRA'} of {step} steps is not saved", error)
        try:
            self._save_state()
            kept.facts.append(f"the state of step {self._saved_at} is kept in '{self._folder.states}'")
        except Exception as error:
            kept.failed(f"the state of step {step} is not saved", error)
        return kept

    def _tell_failures(self, kept: _Kept) -> None:
        if kept.failures:
            self._say(kept.told)

    def _save_state(self) -> None:
        if self._processes.is_writer and self._loop.step > self._saved_at:
            for sink in self._sinks:
                sink.flush()  # first: a run that goes on from this state keeps the log up to it
            self._folder.save(self._loop.state(), self._job.keeping.keep)
            self._add({"kind": "state", "step": self._loop.step})
            self._saved_at = self._loop.step

    def _saved_product(self) -> Finetuned:
        """The product, in its file; of several processes only the writer writes it."""
        job, output, losses = self._job, self._job.output, self._loop.losses
        run = Run(
            title=output.name,
            backbone=job.backbone,
            dataset=job.dataset,
            lora=job.lora,
            settings=job.settings,
            steps=len(losses),
            trained=self._adapters.size,
            share=self._adapters.share,
            recommended_steps=output.recommended_steps,
            recommended_cfg=output.recommended_cfg,
            began=self._began,
        )
        with self._loop.product_in_place():
            if self._processes.is_writer:
                return save_product(output, self._folder, self._adapters, run, losses)
            state = {} if job.lora.full else self._adapters.state(DTYPES[output.dtype])
            return Finetuned(output.name, state, lora_metadata(run), list(losses))

    def _rescue(self, error: BaseException) -> None:
        """After an interruption or error: saves what is good, and says where."""
        if not self._processes.is_writer:
            return
        if not self._loop.intact:
            _LOG.warning("The run '%s' ended inside a step; its last saved state stays.", self._folder.path.name)
            return
        if self._loop.step == self._resumed_at:
            return
        with ignored():
            kept = self._keep()
        if kept.result is not None:
            self._progress.event({"kind": "saved", "step": self._loop.step, "name": kept.result.name})
        told = f"{kept.told}; queue again to go on from there"
        _LOG.warning("The run '%s' ended early (%s): %s", self._folder.path.name, type(error).__name__, told)
        if isinstance(error, ValueError):
            error.args = (f"{error}; {told}",)


@dataclass
class _Kept:
    """What a moment of saving has come to.

    Args:
        result: the product; None where it could not be saved.
        facts, failures: what is on disk and what is not, a clause each.
        error: of the last failure.
    """

    result: Finetuned | None = None
    facts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    error: Exception | None = None

    @property
    def told(self) -> str:
        """All of it."""
        return "; ".join([*self.failures, *self.facts])

    def failed(self, what: str, error: Exception) -> None:
        """Notes what could not be saved, and why."""
        self.failures.append(f"{what}: {error}")
        self.error = error


def _networks(job: Job) -> nn.Module:
    """All that a step calls: the network, and the text encoders where they are trained."""
    text = job.backbone.text if job.lora.text_encoder else None
    return nn.ModuleList([job.backbone.module, *(text.modules.values() if text else ())])


def _thinned(losses: list[float]) -> dict[str, Any]:
    """At most _SHOWN losses of the steps before this sitting, with their steps."""
    every = -(-len(losses) // _SHOWN)
    return {"losses": losses[every - 1 :: every], "steps": list(range(every, len(losses) + 1, every))}


def _without_worst(job: Job, progress: Progress) -> TrainingDataset:
    """The dataset as the run sees it: of pairs, those that are to be left out are."""
    share = job.settings.objective.reflow.drop_worst
    if not share or not isinstance(job.dataset, PairDataset):
        return job.dataset
    return without_worst(job.dataset, share, job.backbone, progress)


def _opened(job: Job, processes: Processes) -> RunFolder:
    """The run's folder: the writer chooses or makes it, and tells the others which."""
    keeping, identity, facts = job.keeping, job.identity(), job.facts()
    chosen, lock = "", None
    if processes.is_writer:
        _require_writable(job.output)
        folder = open_run(keeping.root, job.output.name, identity, keeping.resume, facts)
        lock = folder.lock
        chosen = json.dumps([str(folder.path), folder.state and str(folder.state), folder.note])
    path, state, note = json.loads(processes.told(chosen))
    return RunFolder(Path(path), identity, Path(state) if state else None, facts, note, lock)


def _require_writable(output: Output) -> None:
    """ValueError where the product could not be written, before anything is trained."""
    try:
        require_writable(free_path(output.folder, output.name))
    except ValueError as error:
        raise ValueError(f"output_name: {error}") from error


def _validation(job: Job, loop: Loop) -> Validation | None:
    watch = job.watch
    if not watch.validate_every or watch.held_out is None:
        return None
    return Validation(watch.held_out, loop.objective, job.settings.seed, job.settings.batch_size)


@contextmanager
def _compiled(network: torch.nn.Module, on: bool) -> Iterator[None]:
    """The network through torch.compile while the context lasts."""
    if on:
        network.compile()
    try:
        yield
    finally:
        if on:
            network._compiled_call_impl = None
