"""LoRA files: safetensors with kohya's keys, written whole, read with clear errors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..files import confined, numbered, written_whole
from .lora_keys import is_lora

SUFFIX = ".safetensors"


def free_path(folder: Path, name: str) -> Path:
    """Path for a new LoRA, "name.safetensors"; where that exists, "name_00002.safetensors" and so on.

    Raises:
        ValueError: the name leads out of the folder or is no file name (`files.numbered`).
    """
    confined(folder, name)
    number = 1
    while (path := numbered(folder, name.removesuffix(SUFFIX), number, SUFFIX)).exists():
        number += 1
    return path


def save_lora(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Writes a LoRA file, whole or not at all, and returns its metadata with the hashes of its tensors added.

    Args:
        path: of the file.
        state: tensors by kohya's keys.
        metadata: see `metadata.lora_metadata`.
    """
    from safetensors.torch import save

    tensors = hashlib.sha256(_tensor_bytes(save(dict(state)))).hexdigest()
    complete = {**metadata, "modelspec.hash_sha256": f"0x{tensors}", "sshs_model_hash": tensors}
    with written_whole(path) as temporary:
        temporary.write_bytes(save(dict(state), complete))
    return complete


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a LoRA file, without reading its tensors.

    Raises:
        ValueError: the file cannot be read, is cut short, or is no LoRA.
    """
    from safetensors import safe_open

    with _Named(path), safe_open(path, framework="pt") as file:
        _require_lora(path, file.keys())
        return dict(file.metadata() or {})


def load_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file.

    Raises:
        ValueError: the file cannot be read, is cut short, or is no LoRA.
    """
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    with _Named(path):
        return load_file(path), metadata


class _Named:
    """Turns every reading error into a ValueError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, _NotALora):
            raise ValueError(
                f"the LoRA '{self._path.name}' cannot be read ({error}): it is cut short or not a safetensors file;"
                " copy it again, or convert it to safetensors"
            ) from error


class _NotALora(ValueError):
    pass


def _require_lora(path: Path, keys: Iterable[str]) -> None:
    if not is_lora(keys):
        raise _NotALora(f"'{path.name}' is no LoRA: none of its tensors is one of a LoRA's; choose another file")


def _tensor_bytes(file: bytes) -> memoryview:
    """The part of a safetensors file after its header."""
    return memoryview(file)[8 + int.from_bytes(file[:8], "little") :]
