"""The training loop: one network call a step, each item with its own caption and time; work is never lost."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from . import draws
from .adapters import Adapters, adapted
from .dataset import LatentDataset
from .layers import FIRST, LoraSettings, choose_layers
from .objective import Objective
from .port import Backbone, Progress
from .settings import TrainSettings

_RECENT = 20
_MAX_OVERFLOWS = 20

Save = Callable[[Adapters, "list[float]"], None]
"""Called once with the layers and the losses of the steps done, when training ends, is interrupted or fails."""


class NonFiniteError(ValueError):
    """Training stopped because a loss or gradient was NaN or infinite."""


def train(
    backbone: Backbone,
    dataset: LatentDataset,
    lora: LoraSettings,
    settings: TrainSettings,
    progress: Progress,
    save: Save,
) -> None:
    """Trains a LoRA on a network; the network is afterwards what it was.

    Whatever ends the run early (the host's interruption, a BaseException as well; out of memory; a non-finite loss),
    `save` is called first if at least one step was done, then the exception goes on.

    Args:
        backbone: the network, ready for gradients.
        dataset: what to train on.
        lora: which layers.
        settings: how.
        progress: told after every step; may raise to interrupt.
        save: given the trained layers.

    Raises:
        ValueError: dataset and network do not fit, or no layer is chosen.
        NonFiniteError: a loss or gradient is NaN or infinite; it names the step, whose update was not made.
    """
    # ComfyUI runs every node under inference mode: this is the one place that leaves it.
    with torch.inference_mode(False), torch.enable_grad():
        names = backbone.layer_names()
        _require_fit(backbone.module, names, dataset)
        layers = choose_layers(backbone.module, names, lora)
        with adapted(backbone.module, layers, settings.seed) as adapters:
            loop = _Loop(backbone, dataset, adapters, settings, progress)
            try:
                loop.run()
            finally:
                loop.settle_last()
                if loop.losses:
                    save(adapters, loop.losses)


class _Loop:
    """The state of a run.

    The loss of a step is read while the device is busy with the next one, so that no step waits for it. A step whose
    gradient is not finite is left out by the gradient scaler on the device itself: when its loss is read, the weights
    are still those before it.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: LatentDataset,
        adapters: Adapters,
        settings: TrainSettings,
        progress: Progress,
    ) -> None:
        self.losses: list[float] = []
        self._backbone, self._dataset, self._settings, self._progress = backbone, dataset, settings, progress
        self._objective = Objective(settings.objective, backbone.schedule, backbone.prediction)
        self._parameters, self._size = adapters.parameters(), adapters.size
        self._optimizer = _adamw(self._parameters, settings)
        self._cast = _autocast_dtype(settings.precision, backbone.device)
        self._scaler = _scaler(backbone.device, self._cast)
        self._pending: _Reading | None = None
        self._overflows = 0
        self._began = time.monotonic()

    def run(self) -> None:
        """All steps."""
        total = sum(p.numel() for p in self._backbone.module.parameters())
        share = 100.0 * self._size / max(1, total - self._size)
        self._progress.update(0, f"training {self._size / 1e6:.2f} M parameters, {share:.2f} % of the network")
        for step in range(self._settings.steps):
            loss = self._gradient(step)
            self._settle()
            norm = self._update(step)
            self._pending = _Reading(torch.stack([loss, norm]))
        self._settle()

    def settle_last(self) -> None:
        """Counts the step that was made but not read, if it is good; frees the gradients."""
        reading, self._pending = self._pending, None
        if reading is not None:
            loss, norm = reading.values()
            if math.isfinite(loss) and math.isfinite(norm):
                self.losses.append(loss)
        self._optimizer.zero_grad(set_to_none=True)

    def _gradient(self, step: int) -> Tensor:
        """Forward and backward of a step; its loss ()."""
        seed, size, device = self._settings.seed, self._settings.batch_size, self._backbone.device
        batch = self._dataset.batch(draws.batch_indices(self._dataset.buckets, size, seed, step))
        x_data = self._backbone.scale_latent(batch.latent.to(device)).float()
        x_noise = draws.noise(x_data.shape, seed, step).to(device)
        t = self._objective.times(draws.uniform(size, seed, step)).to(device)
        pooled = None if batch.pooled is None else batch.pooled.to(device)
        conditioning = self._backbone.conditioning(batch.context.to(device), pooled, batch.sizes)
        with self._autocast():
            loss = self._objective.loss(self._backbone, x_data, x_noise, t, conditioning).mean()
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def _update(self, step: int) -> Tensor:
        """Optimizer step with the clipped gradient, left out on the device if that is not finite; its norm ()."""
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm or math.inf)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate_at(step)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return norm

    def _settle(self) -> None:
        """Reads the step made last and reports it; stops the run if it was not finite."""
        reading, self._pending = self._pending, None
        if reading is None:
            return
        loss, norm = reading.values()
        self._require_finite(loss, norm)
        self.losses.append(loss)
        self._progress.update(len(self.losses), self._status())

    def _require_finite(self, loss: float, norm: float) -> None:
        step = len(self.losses) + 1
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
            f"{what} at step {step} of {self._settings.steps}, whose update was not made; lower learning_rate"
            f" ({self._settings.learning_rate}), or set precision to bf16 or fp32"
        )

    def _status(self) -> str:
        done, recent = len(self.losses), self.losses[-_RECENT:]
        rate = done / max(1e-9, time.monotonic() - self._began)
        left = round((self._settings.steps - done) / rate)
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"loss {sum(recent) / len(recent):.4f}, {rate:.2f} it/s, {clock} left"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._cast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._backbone.device.type, dtype=self._cast)


class _Reading:
    """Numbers on their way from the device; asking for them waits only for the work that makes them."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        self._values = values.to("cpu", non_blocking=True)
        if values.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def _adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it."""
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused or None
    )


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What matrix products are cast to, or None."""
    if precision == "auto" and device.type == "cuda":
        has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def _scaler(device: torch.device, cast: torch.dtype | None) -> torch.amp.GradScaler:
    """The scaler that fp16 needs; at a fixed scale of 1 for the rest, where it only withholds non-finite updates."""
    if cast is torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def _require_fit(network: nn.Module, layer_names: Any, dataset: LatentDataset) -> None:
    """Raises ValueError where the dataset's latents or embeddings are not the network's."""
    for path, name in layer_names.items():
        layer = network.get_submodule(path)
        if FIRST.fullmatch(name) and layer.weight.shape[1] != dataset.latent_channels:
            raise ValueError(
                f"model: its network takes {layer.weight.shape[1]} input channels, the dataset's latents have"
                f" {dataset.latent_channels} (inpainting and depth models have more); choose a plain checkpoint"
            )
        if name.endswith(".attn2.to_k") and layer.weight.shape[1] != dataset.context_width:
            raise ValueError(
                f"dataset: its text embeddings are {dataset.context_width} wide, the model takes"
                f" {layer.weight.shape[1]}; make the dataset with the CLIP of the checkpoint that is trained"
            )
