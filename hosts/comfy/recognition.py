"""Which files a MODEL came from: what loaders say of it, else found by its weights.

ComfyUI 0.3.64 says nothing of a file's metadata, newer versions say that of the LoRA loaded last. A LoRA's own tensors
are on the ModelPatcher, though, and a checkpoint's are in the network: they are looked up among the files in ComfyUI's
folders. Of those the headers are read, once for each version of a file, and a few tensors where the header fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.sd
import folder_paths
import torch
from torch import Tensor

from ...training.checkpoint_file import Marks, SafetensorsFile, contents_if_readable, marks
from ..choice import say_once
from ..port import Said

_BASE = "diff2flow.base"
"""Attachment of a ModelPatcher: name of the checkpoint it was loaded from."""
_LORAS = "diff2flow.loras"
"""Attachment of a ModelPatcher: `Applied`, of all that Diff2Flow's own nodes have loaded onto it."""
_STOCK_LORA = "lora_metadata"
"""Attachment under which newer versions' own LoraLoader leaves a LoRA's metadata."""
_BYPASSED = "bypass_lora"
"""Injections under which newer versions run a LoRA beside the weights."""

_UNET = "model.diffusion_model."
_HEAD = 16
"""Values of each tensor by which two checkpoints are told apart."""
_UP, _DOWN = ".lora_up.weight", ".lora_down.weight"
_MOST_FILES = 20_000
_WAY_OUT = (
    "If it was trained by Diff2Flow, load it by Diff2Flow LoRA Loader: without its metadata sampling begins where the"
    " checkpoint's does"
)


@dataclass(frozen=True)
class Applied:
    """What a Diff2Flow node loaded onto a model.

    Args:
        metadata: of the file; None where it has none.
        keys: ComfyUI's set of the file's keys, which all layers of one LoRA on the model share; None for a checkpoint,
            and for a LoRA without low-rank layers.
    """

    metadata: Said | None
    keys: set[str] | None = None


@dataclass(frozen=True)
class _Header:
    """What is kept of a file's header.

    Args:
        metadata: that of a file made by Diff2Flow, else {}.
        marks: of a checkpoint.
        layers: of a LoRA, two of them: name -> shapes of its up and down weights.
    """

    metadata: Said
    marks: Marks
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


_loras: WeakKeyDictionary[Any, tuple[Any, tuple[Said, ...]]] = WeakKeyDictionary()
"""ModelPatcher -> what was on it, and what was found of that."""
_checkpoints: WeakKeyDictionary[Any, Path | None] = WeakKeyDictionary()
"""Network -> the file that its weights are from."""


def note_checkpoint(model: Any, name: str, metadata: Said) -> None:
    """A Diff2Flow node has loaded the model from a file that has this metadata, {} if Diff2Flow did not make it."""
    model.set_attachments(_BASE, name)
    if metadata:
        model.set_attachments(_LORAS, (Applied(metadata),))


def was_noted(model: Any) -> bool:
    """Whether a Diff2Flow node loaded the checkpoint."""
    return _BASE in model.attachments


def note_lora(model: Any, before: Any, metadata: Said | None) -> None:
    """A Diff2Flow node has made the model from `before`, by a LoRA with this metadata."""
    old = {id(keys) for keys, _ in _on(before)}
    new = next((keys for keys, _ in _on(model) if id(keys) not in old), None)
    if new is not None or metadata is not None:
        model.set_attachments(_LORAS, (*model.attachments.get(_LORAS, ()), Applied(metadata, new)))


def said_by_nodes(model: Any) -> tuple[Any, Any]:
    """What loaders have left on a ModelPatcher."""
    return model.attachments.get(_LORAS), model.attachments.get(_STOCK_LORA)


def loras_on(model: Any) -> tuple[Said, ...]:
    """Metadata of what Diff2Flow's nodes loaded onto a ModelPatcher and of other Diff2Flow LoRAs on it, in order.

    LoRAs at strength 0 do not count. One that cannot be found is named in the log, with the way out.
    """
    state = (model.patches_uuid, *said_by_nodes(model))
    known = _loras.get(model)
    if known is None or known[0] != state:
        known = _loras[model] = (state, tuple(_found(model)))
    return known[1]


def checkpoint_of(model: Any) -> Path | None:
    """The checkpoint file that a ModelPatcher was loaded from.

    Where the loader does not say it, only files are found that are marked as v prediction or were made by Diff2Flow.
    """
    name = model.attachments.get(_BASE)
    if name:
        path = folder_paths.get_full_path("checkpoints", name)
        return Path(path) if path else None
    loader, arguments, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    if loader is not None:  # another pack's loader may read something else from its file
        is_told = loader in _loaders() and bool(arguments) and Path(str(arguments[0])).is_file()
        return Path(arguments[0]) if is_told else None
    if model.model not in _checkpoints:
        _checkpoints[model.model] = next((path for path in _telling_checkpoints() if _is_from(model, path)), None)
    return _checkpoints[model.model]


def _loaders() -> list[Any]:
    """ComfyUI's own, which newer versions remember with the file, to load it again."""
    return [getattr(comfy.sd, name, None) for name in ("load_checkpoint_guess_config", "load_diffusion_model")]


def is_merged(model: Any) -> bool:
    """Whether a node has mixed another model's weights in, as ModelMergeSimple does; a LoRA's patches add to them."""
    return any(patch[2] != 1.0 or isinstance(patch[1], list) for each in model.patches.values() for patch in each)


def checkpoint_name(path: Path) -> str:
    """A file's name in ComfyUI's lists of checkpoints and diffusion models; its bare name elsewhere."""
    for kind in ("checkpoints", "diffusion_models"):
        for folder in folder_paths.get_folder_paths(kind):
            if path.is_relative_to(folder):
                return path.relative_to(folder).as_posix()
    return path.name


def marks_of(path: Path) -> Marks:
    """How a checkpoint file says that its network predicts."""
    return _header(path).marks


def metadata_of(path: Path) -> Said:
    """Metadata of a checkpoint that Diff2Flow made, {} of others."""
    return _header(path).metadata


def _found(model: Any) -> Iterator[Said]:
    applied = model.attachments.get(_LORAS, ())
    yield from (each.metadata for each in applied if each.keys is None and each.metadata is not None)
    unknown = False
    for keys, adapters in _on(model):
        own = next((each for each in applied if each.keys is keys), None)
        metadata = own.metadata if own else _metadata_of(keys, adapters)
        unknown |= own is None and metadata is None
        if metadata:
            yield metadata
    if unknown:
        yield from _left_by_host(model)
    if _BYPASSED in model.injections:
        say_once(
            f"a LoRA runs beside the model's weights (bypass), of which ComfyUI does not tell the file. {_WAY_OUT}"
        )


def _left_by_host(model: Any) -> Iterator[Said]:
    """What ComfyUI says of the LoRA loaded last, which no file was found of; else the log says what to do."""
    stock = model.attachments.get(_STOCK_LORA)
    if isinstance(stock, Mapping) and "diff2flow.version" in stock:
        yield stock
        return
    say_once(
        "there is a LoRA on the model of which ComfyUI does not tell the file, and the folder 'loras' holds none with"
        f" its weights. {_WAY_OUT}"
    )


def _on(model: Any) -> Iterator[tuple[set[str], list[Any]]]:
    """The LoRAs on a ModelPatcher at other strengths than 0, in the order of loading: their keys and their layers."""
    found: dict[int, tuple[set[str], list[Any]]] = {}
    for patches in model.patches.values():
        for strength, value, *_ in patches:
            if strength and getattr(value, "name", "") == "lora":
                found.setdefault(id(value.loaded_keys), (value.loaded_keys, []))[1].append(value)
    yield from found.values()


def _metadata_of(keys: set[str], adapters: Sequence[Any]) -> Said | None:
    """Metadata of the file with these layers: {} if Diff2Flow did not make it, None if there is no such file."""
    files = [(path, _header(path)) for path in _files("loras")]
    for path, header in sorted(files, key=lambda each: not each[1].metadata):
        fits = header.layers and all(name + _UP in keys for name in header.layers)
        if fits and _has_layers(adapters, path, header):
            return header.metadata
    return None


def _has_layers(adapters: Sequence[Any], path: Path, header: _Header) -> bool:
    """Whether the layers that are kept of a LoRA file's header are among these, by their values."""
    for name, shapes in header.layers.items():
        alike = [each.weights for each in adapters if tuple(tuple(w.shape) for w in each.weights[:2]) == shapes]
        if not alike:
            return False
        up, down = _tensors(path, (name + _UP, name + _DOWN))
        if not any(_same(up, weights[0]) and _same(down, weights[1]) for weights in alike):
            return False
    return True


def _tensors(path: Path, keys: Sequence[str]) -> list[Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(key) for key in keys]


def _same(stored: Tensor, value: Tensor) -> bool:
    """Whether a tensor is the file's, cast to another dtype or not."""
    return torch.equal(stored.to(value.dtype), value.detach().cpu())


def _telling_checkpoints() -> Iterator[Path]:
    """The checkpoints whose files say something that ComfyUI's loader does not hand on."""
    for path in _files("checkpoints"):
        header = _header(path)
        if header.metadata or header.marks != Marks():
            yield path


def _is_from(model: Any, path: Path) -> bool:
    """Whether a network has a checkpoint file's weights, by the first values of every tensor."""
    from safetensors import safe_open

    contents = contents_if_readable(path)
    if contents is None:
        return False
    kept = {key: entry.weight for key, entry in model.backup.items()}
    weights = {f"model.{key}": value for key, value in {**model.model.state_dict(), **kept}.items()}
    wanted = [key for key, entry in contents.entries.items() if key.startswith(_UNET) and 0 not in entry["shape"]]
    if not wanted or any(key not in weights for key in wanted):
        return False
    with safe_open(path, framework="pt") as file:
        return all(_same(_first(file.get_slice(key)[0:1]), _first(weights[key])) for key in wanted)


def _first(values: Tensor) -> Tensor:
    return values[:1].reshape(-1)[:_HEAD]


def _files(kind: str) -> Iterator[Path]:
    try:
        names = folder_paths.get_filename_list(kind)
    except OSError as error:  # of a folder that is gone, such as a drive's, since ComfyUI listed it
        say_once(f"the folders of '{kind}' cannot be listed ({error}), so that files with metadata are not found there")
        return
    for name in names:
        path = folder_paths.get_full_path(kind, name)
        if path is not None and Path(path).suffix.lower() in (".safetensors", ".sft"):
            yield Path(path)


def _header(path: Path) -> _Header:
    try:
        status = path.stat()
    except OSError:
        return _Header({}, Marks(), {})
    return _header_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=_MOST_FILES)
def _header_of(path: Path, modified: int, size: int) -> _Header:
    contents = contents_if_readable(path)
    if contents is None:
        return _Header({}, Marks(), {})
    metadata = contents.metadata if "diff2flow.version" in contents.metadata else {}
    return _Header(metadata, marks(contents.entries.keys(), contents.metadata), _layers(contents))


def _layers(contents: SafetensorsFile) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The first and the last low-rank layer of the network, as the file lists them."""
    entries = contents.entries
    names = [key.removesuffix(_UP) for key in entries if key.endswith(_UP) and not key.startswith("lora_te")]
    names = [name for name in names if name + _DOWN in entries]
    shapes = {name: [tuple(entries[name + ending]["shape"]) for ending in (_UP, _DOWN)] for name in names}
    return {name: (shapes[name][0], shapes[name][1]) for name in dict.fromkeys(names[:1] + names[-1:])}
