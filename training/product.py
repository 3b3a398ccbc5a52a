"""What a run becomes: a LoRA file, or for full finetuning a checkpoint."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..files import confined, remove_parts
from .adapters import Trained
from .checkpoint_file import save_checkpoint
from .choices import DTYPES
from .lora_file import SUFFIX, free_path, save_lora
from .metadata import Run, checkpoint_metadata, lora_metadata
from .run_folder import RunFolder

_LOG = logging.getLogger(__name__)
_NO_BASE = (
    "the file does not say which base it was trained on, since the host does not tell where the model came from; load"
    " the model by Diff2Flow Checkpoint Loader to have the base's name and hash in the file"
)


@dataclass(frozen=True)
class Output:
    """Where the file goes and what it recommends.

    Args:
        folder: of LoRA files, for preset full of checkpoints.
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
    """A trained LoRA or checkpoint: the tensors and metadata are those in the file.

    Args:
        name: of the file, relative to the folder, as LoraLoader lists it.
        state: a LoRA's tensors; empty for a checkpoint.
        metadata: its metadata.
        losses: of each step done.
    """

    name: str
    state: dict[str, Tensor]
    metadata: dict[str, str]
    losses: list[float]


def path_of(output: Output, folder: RunFolder, steps: int) -> Path:
    """The run's own file, if it has saved one before and it is still there; else a new one, numbered where needed.

    What the run's folder says of it counts only where it is a file of this run's name. A run that began anew replaces
    no file of more steps than it has made itself.
    """
    name = folder.product.replace("\\", "/")
    stem = re.escape(output.name.replace("\\", "/").removesuffix(SUFFIX))
    if name and re.fullmatch(rf"{stem}(_\d{{5}})?{re.escape(SUFFIX)}", name):
        own = confined(output.folder, name)
        if own.is_file() and folder.replaces(steps):
            return own
    elif name:
        _LOG.warning("The run '%s' says that its file is '%s', which it is not.", folder.path.name, name[:200])
    return free_path(output.folder, output.name)


def save_product(output: Output, folder: RunFolder, trained: Trained, run: Run, losses: list[float]) -> Finetuned:
    """Writes the file, whole or not at all; under another name where another program keeps the run's own file open.

    Args:
        output: where it goes.
        folder: of the run, which remembers the file's name.
        trained: the values to save stand in it.
        run: what its metadata says.
        losses: of each step done.

    Raises:
        DiskFullError: there is no room for it; names the folder.
    """
    path = path_of(output, folder, run.steps)
    remove_parts(path.parent, path.name)
    try:
        state, metadata = _written(path, output, folder, trained, run)
    except PermissionError as error:
        taken, path = path, free_path(output.folder, output.name)
        if not taken.exists() or path == taken:
            raise
        _LOG.warning("'%s' is kept open by another program (%s): saved as '%s' instead", taken, error, path.name)
        state, metadata = _written(path, output, folder, trained, run)
    if not run.backbone.base_name:
        _LOG.warning("%s", _NO_BASE)
    _LOG.info("%d steps saved: %s", run.steps, path)
    return Finetuned(_name_of(path, output), state, metadata, list(losses))


def _name_of(path: Path, output: Output) -> str:
    return str(path.relative_to(output.folder))


Written = tuple[dict[str, Tensor], dict[str, str]]


def _written(path: Path, output: Output, folder: RunFolder, trained: Trained, run: Run) -> Written:
    run = replace(run, title=path.stem)
    # Before: of a process that is killed in between, the next one knows the file as its own.
    folder.record_product(_name_of(path, output), run.steps)
    return (_save_checkpoint if run.lora.full else _save_lora)(path, output, trained, run)


def _save_lora(path: Path, output: Output, trained: Trained, run: Run) -> Written:
    state = trained.state(DTYPES[output.dtype])
    return state, save_lora(path, state, lora_metadata(run))


def _save_checkpoint(path: Path, output: Output, trained: Trained, run: Run) -> Written:
    """The tensors stay where they are: the caller loads the file."""
    base, metadata = run.backbone.base_path, checkpoint_metadata(run)
    return {}, save_checkpoint(path, base, trained.tensors, metadata, DTYPES[output.dtype])
