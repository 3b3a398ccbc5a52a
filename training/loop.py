"""The training loop: one network call a micro-batch, each item with its own caption and time."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import draws, optimizers
from .adapters import Trained
from .conditioning import conditioned
from .dataset import Batch
from .ema import Averages
from .lines import Line, Lines, Velocity
from .memory import is_out_of_memory, smaller_memory
from .objective import Objective
from .parallel import Processes
from .port import Backbone, TrainingDataset
from .settings import TrainSettings
from .signals import delayed
from .state import State, require_fit, restore
from .transfer import to_device
from .transport import transported

_LOG = logging.getLogger(__name__)
_MAX_OVERFLOWS, _NAMED = 20, 4


class NonFiniteError(ValueError):
    """Training stopped because a loss or gradient was NaN or infinite."""


@dataclass(frozen=True)
class StepReport:
    """A step that was made and read.

    Args:
        step: 1, 2, ...
        loss: mean over the batch.
        grad_norm: before clipping.
        learning_rate: of the network's layers.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class MicroBatch:
    """What one network call trains on, on the CPU.

    Args:
        batch: the items.
        x_noise: (B, *dims), the items' own or drawn.
        t: (B,) flow times.
        step: that it is for.
        unguided: the items without captions, where a teacher is guided online.
    """

    batch: Batch
    x_noise: Tensor
    t: Tensor
    step: int
    unguided: Batch | None = None


Report = Callable[[StepReport], object]


class Loop:
    """The state of a run.

    The loss of a step is read while the device is busy with the next one, so that no step waits for it. A step whose
    gradient is not finite is left out by the gradient scaler on the device itself: when its loss is read, the weights
    are still those before it.

    Args:
        backbone: the network, with its layers injected.
        dataset: what to train on.
        adapters: the injected layers.
        settings: how.
        processes: this run's.
        state: to go on from.

    Attributes:
        losses: of the steps made and read.
        intact: False only while the optimizer changes the weights; what was interrupted there is neither this step
            nor the last.

    Raises:
        ValueError: the optimizer's library is missing, the state does not fit, or the batch cannot be split so.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: TrainingDataset,
        adapters: Trained,
        settings: TrainSettings,
        processes: Processes,
        state: State | None = None,
    ) -> None:
        self.losses: list[float] = []
        self.intact = True
        self.objective = Objective(settings.objective, backbone.schedule, backbone.prediction)
        # Its table is made before `memory.estimate` traces the loss with tensors that hold nothing.
        self.objective.alignment.timestep(torch.zeros(1, device=backbone.device))
        self._backbone, self._dataset, self._settings, self._processes = backbone, dataset, settings, processes
        self._adapters, self._options = adapters, settings.optimizer
        _require_parts(settings, processes)
        self._parameters = adapters.parameters()
        self._optimizer = optimizers.build_optimizer(
            self._options.name,
            adapters.groups(),
            settings.learning_rate,
            (self._options.beta1, self._options.beta2),
            self._options.weight_decay,
        )
        self._lines = Lines(self.objective, settings.steps)
        self._teacher_cfg = settings.objective.reflow.teacher_cfg
        self._cast = autocast_dtype(self._options.precision, backbone.device)
        self._scaler = _scaler(backbone.device, self._cast)
        self._averages = Averages(self._parameters, self._options.ema)
        self._accumulation = self._options.accumulation
        self._order = draws.Order(dataset.buckets, settings.batch_size, settings.seed)
        self._pending: _Reading | None = None
        self._overflows = 0
        if state is not None:
            self._restore(state)

    @property
    def step(self) -> int:
        """Steps made and read."""
        return len(self.losses)

    def run(
        self,
        report: Report,
        due: Callable[[int], bool],
        pause: Callable[[], object],
        say: Callable[[str], object] = _LOG.warning,
    ) -> None:
        """All steps that are left.

        Args:
            report: told of every step, one step late unless a pause follows it; may raise to interrupt.
            due: whether to pause after this many steps.
            pause: called with every step up to there made and read; ends the run there if it returns True.
            say: told in words of what changes on the way: smaller network calls after memory ran out.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; it names the step, whose update was not made.
            ValueError: something that is trained gets no gradient, or memory ran out with one item in a call.
        """
        first = self.step
        for step in range(first, self._settings.steps):
            loss = self._gradient(step, say)
            if step == first:
                self._require_gradients()
            self._settle(report)
            with delayed():
                self.intact = False
                norm = self._update(step)
                self._pending = _Reading(torch.stack([loss, norm]), self._settings.learning_rate_at(step))
                self.intact = True
            if due(step + 1):
                self._settle(report)
                if pause() is True:
                    return
        self._settle(report)

    def settle_last(self, report: Report) -> None:
        """Counts the step that was made but not read, if it is good; frees the gradients."""
        with contextlib.suppress(NonFiniteError):
            self._settle(report)
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> State:
        """What the next step depends on."""
        return State(
            step=self.step,
            parameters=[p.detach() for p in self._parameters],
            averages=self._averages.values,
            optimizer=self._optimizer.state_dict(),
            scaler=self._scaler.state_dict(),
            losses=self.losses,
        )

    @contextmanager
    def product_in_place(self) -> Iterator[None]:
        """The weights that are saved and sampled (averages, where there are any) stand in the network, which is ready:
        what is saved of DoRA is told by the frozen weights, too."""
        self._backbone.ready()
        with optimizers.weights_to_use(self._optimizer, self._parameters), self._averages.in_place():
            yield

    def micro_batch(self, indices: list[int], step: int, micro: int = 0) -> MicroBatch:
        """This process's part of a micro-batch of a step."""
        size, seed = len(indices), self._settings.seed
        part = self._processes.part(size, micro, self._accumulation)
        flips = draws.flips(size, seed, step)
        dropped = draws.dropouts(size, self._settings.objective.caption_dropout, seed, step)
        batch = self._dataset.batch(indices[part], flips[part], dropped[part])
        x_noise = batch.noise
        if x_noise is None:
            x_noise = self._drawn_noise(batch.latent, size, step, part)
        unguided = None
        if self._settings.objective.reflow.guides_online:
            unguided = self._dataset.batch(indices[part], flips[part], [True] * len(batch.latent))
        t = self.objective.times(draws.uniform(size, seed, step)[part])
        return MicroBatch(batch, x_noise, t, step, unguided)

    def _drawn_noise(self, latent: Tensor, size: int, step: int, part: slice) -> Tensor:
        """Noise (B, *dims) for this process's latents (B, *dims) of a step of `size` items."""
        x_noise = draws.noise((size, *latent.shape[1:]), self._settings.seed, step)[part]
        if not self._settings.objective.transports:
            return x_noise
        return transported(self._backbone.scale_latent(latent), x_noise)

    def loss(self, micro: MicroBatch) -> Tensor:
        """Its loss (), with its graph."""
        batch, device = micro.batch, self._backbone.device
        t = to_device(micro.t, device)
        mask = None if batch.mask is None else to_device(batch.mask, device)
        with self._autocast():
            conditioning = conditioned(self._backbone, batch, self._adapters.trains_text)
            x_data, x_noise = self._line(micro, t, conditioning)
            return self.objective.loss(self._backbone, x_data, x_noise, t, conditioning, mask).mean()

    def _line(self, micro: MicroBatch, t: Tensor, conditioning: Mapping[str, Tensor]) -> Line:
        """What each item is to learn: the line between its noise and its latent, or what reflow makes of it."""
        batch, device = micro.batch, self._backbone.device
        x_noise = to_device(micro.x_noise, device)
        x_data = self._backbone.scale_latent(to_device(batch.latent, device)).float()
        if self._settings.objective.reflow.windows:
            with torch.no_grad(), self._adapters.switched_off():
                return self._lines.across_window(self._teacher(micro), x_data, x_noise, t)
        if batch.noise is None or self._settings.objective.name == "diffusion":
            return Line(x_data, x_noise)
        line = self._lines.of_pairs(x_data, x_noise)
        if not self._lines.is_consistent(micro.step):
            return line
        return self._lines.to_own_prediction(self._velocity(conditioning), line, t)

    def _teacher(self, micro: MicroBatch) -> Velocity:
        """The guided velocity of the network with everything that is trained switched off."""
        positive = self._velocity(conditioned(self._backbone, micro.batch))
        if micro.unguided is None:
            return positive
        negative, cfg = self._velocity(conditioned(self._backbone, micro.unguided)), self._teacher_cfg
        return lambda x, t: torch.lerp(negative(x, t), positive(x, t), cfg)

    def _velocity(self, conditioning: Mapping[str, Tensor]) -> Velocity:
        return lambda x, t: self.objective.velocity(self._backbone, x, t, conditioning)

    def _gradient(self, step: int, say: Callable[[str], object]) -> Tensor:
        """The gradient of a step, in smaller network calls as long as memory runs out; the step's loss ()."""
        while True:
            try:
                self._backbone.ready()
                return self._accumulated(step)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error).splitlines()[0]
            # Only here the tensors that the error's traceback held are free.
            say(self._smaller_calls(step, failure))

    def _smaller_calls(self, step: int, failure: str) -> str:
        """Splits the same batch into at least twice as many network calls; what was done, in words.

        Raises:
            ValueError: it cannot be split further.
        """
        self._optimizer.zero_grad(set_to_none=True)
        self._backbone.free_memory()
        size, parts, device = self._settings.batch_size, self._processes.count, self._backbone.device
        before = size // (self._accumulation * parts)
        ran_out = f"memory ran out on {device} in step {step + 1} with {before} item(s) in a network call"
        smaller = [count for count in range(1, before // 2 + 1) if size // parts % count == 0]
        if self._settings.objective.transports or parts > 1:
            smaller = []  # the pairing is made within a call; several processes would have to agree
        if not smaller:
            raise ValueError(f"{ran_out} ({failure}): {smaller_memory(self._settings)}")
        self._accumulation = size // (smaller[-1] * parts)
        return f"{ran_out}; goes on with {smaller[-1]} in each of {self._accumulation} calls, which is the same batch"

    def _require_gradients(self) -> None:
        """Raises ValueError where a trained layer has no gradient after the first step: it would never change."""
        names = self._adapters.without_gradient()
        if names:
            raise ValueError(
                f"{len(names)} of the trained layers get no gradient and would never change: {_listed(names)}; something"
                " between them and the loss has no backward pass: an attention kernel that a start option or a node has"
                " switched on (SageAttention, FlashAttention), or a patch on the model; switch that off while training"
            )

    def _accumulated(self, step: int) -> Tensor:
        """Forward and backward of a step, averaged over micro-batches and processes; its loss ()."""
        self._optimizer.zero_grad(set_to_none=True)
        count, total = self._accumulation, torch.zeros((), device=self._backbone.device)
        indices = self._order.batch(step)
        for micro in range(count):
            loss = self.loss(self.micro_batch(indices, step, micro)) / count
            if not loss.requires_grad:
                self._require_gradients()
            self._scaler.scale(loss).backward()
            total += loss.detach()
        if self._processes.count > 1:
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            self._processes.average([*gradients, total])
        return total

    def _update(self, step: int) -> Tensor:
        """Optimizer step with the clipped gradient, left out on the device if that is not finite; its norm ()."""
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._options.max_grad_norm or math.inf)
        rate = self._settings.learning_rate_at(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * (self._options.text_rate if group["name"] == "text" else 1.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return norm

    def _settle(self, report: Report) -> None:
        """Reads the step made last and reports it; stops the run if it was not finite."""
        if self._pending is None:
            return
        with delayed():
            reading, self._pending = self._pending, None
            loss, norm = reading.values()
            self._require_finite(loss, norm)
            self._averages.update(self.step)
            self.losses.append(loss)
        report(StepReport(self.step, loss, norm, reading.learning_rate))

    def _require_finite(self, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            what = f"the loss became {loss}"
        elif math.isfinite(norm):
            self._overflows = 0
            return
        else:
            self._overflows += 1
            if self._cast is torch.float16 and self._overflows < _MAX_OVERFLOWS:
                return  # the scaler is looking for its scale: usual in the first steps of fp16
            what = f"the gradient became {norm} (loss {loss:.4g})"
        raise NonFiniteError(
            f"{what} at step {self.step + 1} of {self._settings.steps}, whose update was not made; lower learning_rate"
            f" ({self._settings.learning_rate}), or set precision to bf16 or fp32"
        )

    def _restore(self, state: State) -> None:
        require_fit(state, self._parameters, self._averages.values, self._optimizer, self._scaler.state_dict())
        restore(self._parameters, state.parameters)
        restore(self._averages.values, state.averages)
        self._optimizer.load_state_dict(state.optimizer)
        if state.scaler:
            self._scaler.load_state_dict(state.scaler)
        self.losses = list(state.losses)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._cast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._backbone.device.type, dtype=self._cast)


class _Reading:
    """Loss and norm on their way from the device; asking for them waits only for the work that makes them."""

    def __init__(self, values: Tensor, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self._event = None
        self._values = values.to("cpu", non_blocking=True)
        if values.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def _listed(names: list[str]) -> str:
    """The first few of many names."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matrix products are cast to; None computes in float32, whatever the checkpoint is stored in.

    "auto" is bf16 on CUDA, ROCm and XPU, fp16 on NVIDIA cards before Ampere, and float32 elsewhere (CPU, MPS,
    DirectML): fp16 without a loss scale loses small gradients.
    """
    if precision == "auto" and device.type == "cuda":
        has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if has_bf16 else torch.float16
    if precision == "auto" and device.type == "xpu":
        return torch.bfloat16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def _scaler(device: torch.device, cast: torch.dtype | None) -> torch.amp.GradScaler:
    """The scaler that fp16 needs; at a fixed scale of 1 for the rest, where it only withholds non-finite updates."""
    if cast is torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def _require_parts(settings: TrainSettings, processes: Processes) -> None:
    parts = settings.optimizer.accumulation * processes.count
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size ({settings.batch_size}) must be a multiple of accumulation times processes"
            f" ({settings.optimizer.accumulation} × {processes.count} = {parts})"
        )
    if settings.objective.transports and settings.batch_size < 2 * parts:
        raise ValueError(
            f"pairing '{settings.objective.pairing}' chooses between the noises of one network call, which has"
            f" {settings.batch_size // parts} item (batch_size {settings.batch_size}); raise batch_size to at least"
            f" {2 * parts}, or choose pairing 'independent'"
        )
