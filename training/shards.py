"""Tensors on disk by key: safetensors shards that only ever grow in number, read lazily."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole

_LOG = logging.getLogger(__name__)
_DIGEST = "sha256"


class ShardStore:
    """A folder of shards, each a safetensors file with some keys; a key is in one shard.

    A shard that was cut short or altered is named in the log and removed, so that its keys are missing and made
    again. Shards appear whole or not at all; keys added and not flushed are lost with the process.

    Args:
        folder: of the shards; made when first written to.
        shard_size: keys collected before a shard is written.
    """

    def __init__(self, folder: Path, shard_size: int = 64) -> None:
        self._folder, self._shard_size = folder, shard_size
        self._pending: dict[str, Tensor] = {}
        self._open: dict[Path, Any] = {}
        self.damaged: list[str] = []
        self._shard_of = self._index()

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of or key in self._pending

    def get(self, key: str) -> Tensor:
        """The tensor of a key, read from its shard.

        Raises:
            KeyError: there is none.
        """
        if key in self._pending:
            return self._pending[key]
        return self._opened(self._shard_of[key]).get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a key's tensor, without reading it."""
        if key in self._pending:
            return tuple(self._pending[key].shape)
        return tuple(self._opened(self._shard_of[key]).get_slice(key).get_shape())

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors that belong together (they go into one shard)."""
        with torch.inference_mode(False):
            copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
            self._pending.update(copies)
        if len(self._pending) >= self._shard_size:
            self.flush()

    def flush(self) -> None:
        """Writes what was added to a new shard."""
        if not self._pending:
            return
        from safetensors.torch import save_file

        path = self._folder / f"{self._next_number():05d}.safetensors"
        ordered = dict(sorted(self._pending.items()))
        with written_whole(path) as temporary:
            save_file(ordered, temporary, {_DIGEST: _digest(ordered)})
        self._shard_of.update(dict.fromkeys(ordered, path))
        self._pending = {}

    def _next_number(self) -> int:
        numbers = [int(p.stem) for p in self._folder.glob("*.safetensors") if p.stem.isdigit()]
        return max(numbers, default=0) + 1

    def _index(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                keys = _checked_keys(path)
            except Exception as error:  # safetensors raises its own type; whatever it is, the shard is made again
                _LOG.warning("The cached shard %s is damaged (%s): it is removed and made again.", path, error)
                self.damaged.append(path.name)
                path.unlink()
            else:
                found.update(dict.fromkeys(keys, path))
        return found

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            from safetensors import safe_open

            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


def _checked_keys(path: Path) -> Iterable[str]:
    """Keys of a shard whose bytes are what was written.

    Raises:
        ValueError: they are not.
        Exception: safetensors' own, for a file that is cut short.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        recorded = (file.metadata() or {}).get(_DIGEST)
        if recorded != _digest({key: file.get_tensor(key) for key in sorted(keys)}):
            raise ValueError("its content does not match its checksum")
    return keys


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for key, tensor in tensors.items():
        sha.update(json.dumps([key, list(tensor.shape), str(tensor.dtype)]).encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
