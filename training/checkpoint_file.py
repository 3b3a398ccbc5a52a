"""Checkpoint files, streamed: the base's with a trained network in its place, or composed of single tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..alignment.precision import FLOAT64
from ..files import written_whole
from .port import Backbone

_DTYPES = {
    "F64": FLOAT64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK = 1 << 22
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "format")
_HEADER_LIMIT = 100_000_000
V_MARK, SNR_MARK = "v_pred", "ztsnr"
_UNET = "model.diffusion_model."
"""Before those names in some files."""
_SAVING = ("CheckpointSave", "ModelSave")
"""ComfyUI's nodes that write their workflow into the file of a model."""
_V_METADATA = ("diff2flow.prediction", "modelspec.predict_key", "modelspec.prediction_type")


@dataclass(frozen=True)
class SafetensorsFile:
    """The table of contents of a safetensors file.

    Args:
        path: of the file.
        entries: key -> {"dtype", "shape", "data_offsets"}, in the file's order.
        metadata: of the file.
        begin: where the tensors' bytes begin.
    """

    path: Path
    entries: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    begin: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is to be written, made when its turn comes.

    Args:
        shape: in the file.
        dtype: as it is; `write_checkpoint` may round it to another.
        read: gives the values, in any shape of as many elements, on any device.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by key, each read when it is asked for.

    Raises:
        ValueError: the file cannot be read, or holds a tensor of a kind that torch does not have.
    """
    entries = read_contents(path).entries
    strange = next((entry["dtype"] for entry in entries.values() if entry["dtype"] not in _DTYPES), None)
    if strange:
        raise ValueError(f"the checkpoint '{path.name}' holds tensors in the format {strange}; convert it to fp16")
    return {
        key: StoredTensor(tuple(entry["shape"]), _DTYPES[entry["dtype"]], partial(_read_tensor, path, key))
        for key, entry in entries.items()
    }


def _read_tensor(path: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def write_checkpoint(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Writes a checkpoint, whole or not at all, with one tensor at a time in memory.

    Args:
        path: of the new file.
        tensors: by key.
        metadata: of the file.
        dtype: of all floating-point tensors in the file; others keep theirs.

    Raises:
        ValueError: a tensor is not finite in `dtype`.
    """
    kinds = {key: dtype if tensor.dtype.is_floating_point else tensor.dtype for key, tensor in tensors.items()}
    entries, offset = {}, 0
    for key, tensor in tensors.items():
        length = math.prod(tensor.shape) * kinds[key].itemsize
        offsets = [offset, offset + length]
        entries[key] = {"dtype": _NAMES[kinds[key]], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += length
    with written_whole(path) as temporary, open(temporary, "wb") as new:
        new.write(_header({"format": "pt", **metadata}, entries))
        for key, tensor in tensors.items():
            _write_tensor(new, key, tensor.read(), kinds[key])
        new.flush()
        os.fsync(new.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file of tensors as they are, whole or not at all, with one of them at a time in memory.

    Args:
        path: of the new file.
        tensors: by key, on any device.
        metadata: of the file.

    Raises:
        DiskFullError: there is no room for it (`files.written_whole`).
    """
    header, ordered = _begun(tensors, metadata)
    with written_whole(path) as temporary, open(temporary, "wb") as new:
        new.write(header)
        for tensor in ordered:
            new.write(_bytes_of(tensor.detach().cpu()))


def size_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `write_tensors` makes of them."""
    return len(_begun(tensors, metadata)[0]) + sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _begun(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """A file's header, and the tensors in their order: those of wide numbers first, as readers map them where they
    lie, which must be a multiple of their width."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    entries, offset = {}, 0
    for key, tensor in ordered:
        end = offset + tensor.numel() * tensor.itemsize
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return _header(metadata, entries), [tensor for _, tensor in ordered]


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _header(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    """A safetensors file's beginning: its length, then the table of contents."""
    header = json.dumps({"__metadata__": metadata, **entries}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def read_contents(path: Path) -> SafetensorsFile:
    """The table of contents, without reading a tensor.

    Raises:
        ValueError: the file cannot be read, is cut short, or is no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_HEADER_LIMIT, path.stat().st_size - 8):
                raise ValueError("no header of a safetensors file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"{path.stat().st_size} bytes instead of {8 + length + end}")
        return SafetensorsFile(path, header, metadata, 8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint '{path.name}' cannot be read ({error}): it is cut short or not a safetensors file; copy"
            " it again"
        ) from error


def contents_if_readable(path: Path) -> SafetensorsFile | None:
    """The table of contents; None for a broken file and for one of another format."""
    if path.suffix.lower() not in (".safetensors", ".sft"):
        return None
    try:
        return read_contents(path)
    except ValueError:
        return None


def trained_metadata(path: Path) -> dict[str, str]:
    """Metadata of a checkpoint that was trained by Diff2Flow; empty for every other file, a broken one as well."""
    contents = contents_if_readable(path)
    return dict(contents.metadata) if contents and "diff2flow.version" in contents.metadata else {}


@dataclass(frozen=True)
class Marks:
    """What a checkpoint file says of how its network predicts, beside its weights.

    Args:
        v: v prediction.
        zero_terminal_snr: a schedule rescaled so; it counts for v models only.
        lost_v: not marked, though ComfyUI saved it behind ModelSamplingDiscrete with v_prediction, as the workflow in
            the file tells: what a node has chosen is not saved.
    """

    v: bool = False
    zero_terminal_snr: bool = False
    lost_v: bool = False


def marks(keys: Collection[str], metadata: Mapping[str, str]) -> Marks:
    """The marks of a checkpoint, by the tensors without values `v_pred` and `ztsnr`, or by its metadata.

    Metadata is Diff2Flow's own, ComfyUI's `modelspec.predict_key` and the standard's `modelspec.prediction_type`.
    """
    v = _has(keys, V_MARK) or any(metadata.get(key) == "v" for key in _V_METADATA)
    zero = _has(keys, SNR_MARK) or metadata.get("diff2flow.zero_terminal_snr") == "true"
    return Marks(v, zero, not v and _saved_behind_v(metadata.get("prompt", "")))


def _saved_behind_v(workflow: str) -> bool:
    """Whether a workflow in API format has a node that saves a model from behind ModelSamplingDiscrete v_prediction."""
    try:
        nodes = json.loads(workflow or "{}")
        saving = [node for node in nodes.values() if node["class_type"] in _SAVING]
        return any(_is_behind_v(nodes, node["inputs"].get("model")) for node in saving)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _is_behind_v(nodes: Mapping[str, Any], link: Any) -> bool:
    """Whether the last node before a MODEL that chooses its sampling is that one."""
    if not isinstance(link, list):
        return False
    node = nodes[link[0]]
    if node["class_type"].startswith("ModelSampling"):
        return node["inputs"].get("sampling") == "v_prediction" and node["class_type"] == "ModelSamplingDiscrete"
    return _is_behind_v(nodes, node["inputs"].get("model"))


def _has(keys: Collection[str], mark: str) -> bool:
    return mark in keys or _UNET + mark in keys


def mark_names(v: bool, zero_terminal_snr: bool) -> list[str]:
    """Names of the tensors without values that mark such a network."""
    return [V_MARK] * v + [SNR_MARK] * zero_terminal_snr


def require_base(backbone: Backbone) -> None:
    """Raises where the network cannot be saved as a checkpoint, before it is trained.

    Raises:
        ValueError: the base is unknown, no .safetensors file, or lacks a tensor of the network.
    """
    path, where = backbone.base_path, "preset full saves a whole checkpoint"
    if path is None:
        raise ValueError(
            f"{where} and needs the file that the model came from, which is unknown here: load the model by Diff2Flow"
            " Checkpoint Loader"
        )
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{where} made from its base, which must be a .safetensors file, not '{path.name}'; convert it first"
        )
    _require_tensors(read_contents(path), backbone)


def _require_tensors(contents: SafetensorsFile, backbone: Backbone) -> None:
    names, file = backbone.checkpoint_names(), contents.path.name
    for path, parameter in backbone.module.named_parameters(remove_duplicate=False):
        key = names.get(path, path)
        if path not in names or key not in contents.entries:
            raise ValueError(
                f"preset full: the base checkpoint '{file}' has no tensor '{key}', so that none can be made from it;"
                " choose a full checkpoint in the original Stable Diffusion layout"
            )
        if _count(contents.entries[key]["shape"]) != parameter.numel():
            raise ValueError(
                f"preset full: the tensor '{key}' of '{file}' has another size than the model's; choose another base"
            )


def save_checkpoint(
    path: Path,
    base: Path,
    trained: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> dict[str, str]:
    """Writes a checkpoint, whole or not at all: the base's tensors, but for the trained ones; returns its metadata.

    One tensor at a time is in memory. Shapes are the base's (a 1×1 convolution may be trained as a linear layer).

    Args:
        path: of the new file.
        base: safetensors file; its metadata is kept where `metadata` says nothing else.
        trained: key in the base -> tensor, on any device.
        metadata: see `metadata.checkpoint_metadata`.
        dtype: of the trained tensors in the file; None for those of the base. All others keep theirs.

    Raises:
        ValueError: the base cannot be read or lacks a key, or a trained tensor is not finite in its dtype.
    """
    contents = read_contents(base)
    missing = [key for key in trained if key not in contents.entries]
    if missing:
        raise ValueError(f"the base checkpoint '{base.name}' has no tensor '{missing[0]}'")
    kept = {key: value for key, value in contents.metadata.items() if key not in _STALE}
    complete = {**kept, "format": "pt", **metadata}
    entries = _new_entries(contents, trained, dtype)
    with written_whole(path) as temporary, open(temporary, "wb") as new, open(base, "rb") as old:
        new.write(_header(complete, entries))
        for key, entry in contents.entries.items():
            if key in trained:
                _write_tensor(new, key, trained[key], _DTYPES[entries[key]["dtype"]])
            else:
                _copy(new, old, contents.begin + entry["data_offsets"][0], _length(entry))
        new.flush()
        os.fsync(new.fileno())
    return complete


def _new_entries(
    contents: SafetensorsFile, trained: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, dict[str, Any]]:
    entries, offset = {}, 0
    for key, entry in contents.entries.items():
        name, length = entry["dtype"], _length(entry)
        if key in trained:
            if _count(entry["shape"]) != trained[key].numel():
                raise ValueError(f"the trained tensor '{key}' has another size than in '{contents.path.name}'")
            name = _NAMES[dtype] if dtype else name if name in _DTYPES else "F32"
            length = trained[key].numel() * _DTYPES[name].itemsize
        entries[key] = {"dtype": name, "shape": entry["shape"], "data_offsets": [offset, offset + length]}
        offset += length
    return entries


def _write_tensor(file: IO[bytes], key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    values = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(values.float()).all():
        raise ValueError(f"the tensor '{key}' is not finite in {dtype}; save in bf16 or fp32")
    file.write(_bytes_of(values))


def _copy(new: IO[bytes], old: IO[bytes], begin: int, length: int) -> None:
    old.seek(begin)
    while length:
        block = old.read(min(_BLOCK, length))
        if not block:
            raise ValueError("the base checkpoint became shorter while it was read")
        new.write(block)
        length -= len(block)


def _length(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
