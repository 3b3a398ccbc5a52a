"""One finetuning, from a network and a dataset to a LoRA file."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Adapters
from .dataset import LatentDataset
from .layers import LoraSettings
from .loop import train
from .lora_file import free_path, save_lora
from .metadata import Run, lora_metadata
from .port import Backbone, Progress
from .settings import TrainSettings

_LOG = logging.getLogger(__name__)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoraOutput:
    """Where the LoRA goes and what it recommends.

    Args:
        folder: of LoRA files.
        name: inside it, without number; checked here, an existing file of that name is never overwritten.
        dtype: of the saved tensors, of DTYPES.
        recommended_steps, recommended_cfg: for whoever samples with it.

    Raises:
        ValueError: a name that leads out of the folder, an unknown dtype, steps below 1.
    """

    folder: Path
    name: str
    dtype: str = "fp16"
    recommended_steps: int = 25
    recommended_cfg: float = 7.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"save_dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.recommended_steps < 1:
            raise ValueError(f"recommended_steps must be at least 1, not {self.recommended_steps}")
        try:
            free_path(self.folder, self.name)
        except ValueError as error:
            raise ValueError(f"output_name: {error}") from error


@dataclass(frozen=True)
class Finetuned:
    """A trained LoRA: the tensors and metadata are those in the file.

    Args:
        name: of the file, relative to the folder, as LoraLoader lists it.
        state: its tensors.
        metadata: its metadata.
        losses: of each step done.
    """

    name: str
    state: dict[str, Tensor]
    metadata: dict[str, str]
    losses: list[float]


def finetune(
    backbone: Backbone,
    dataset: LatentDataset,
    lora: LoraSettings,
    settings: TrainSettings,
    output: LoraOutput,
    progress: Progress,
) -> Finetuned:
    """Trains and saves a LoRA. Interrupted or failed, what is done is saved before the exception goes on.

    Raises:
        ValueError: see `loop.train`; the message ends with the name of the file where one was saved.
    """
    saved: list[Finetuned] = []
    began = time.time()

    def save(adapters: Adapters, losses: list[float]) -> None:
        steps = output.recommended_steps, output.recommended_cfg
        path = free_path(output.folder, output.name)
        done = len(losses), adapters.size, *steps, began, adapters.share
        run = Run(path.stem, backbone, dataset, lora, settings, *done)
        saved.append(_saved(path, output, adapters, run, losses))

    try:
        train(backbone, dataset, lora, settings, progress, save)
    except ValueError as error:
        if not saved:
            raise
        kept = f"the {len(saved[0].losses)} steps before it are saved as '{saved[0].name}'"
        raise ValueError(f"{error}; {kept}") from error
    finally:
        progress.close()
    return saved[0]


def _saved(path: Path, output: LoraOutput, adapters: Adapters, run: Run, losses: list[float]) -> Finetuned:
    state = adapters.state(DTYPES[output.dtype])
    metadata = save_lora(path, state, lora_metadata(run))
    _LOG.info("LoRA of %d steps saved: %s", run.steps, path)
    return Finetuned(str(path.relative_to(output.folder)), state, metadata, list(losses))
