"""Tensors on disk by key: safetensors shards that only ever grow in number, read lazily."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..files import remove_parts
from .checkpoint_file import write_tensors
from .key_index import KeyIndex
from .records import Records
from .shard_file import ShardFile

_LOG = logging.getLogger(__name__)
DIGEST = "sha256"
"""Key of a shard's `content_digest` (names sorted) in its metadata."""
LOST_AT_MOST = 20.0
"""Seconds of work that a killed process may lose."""
_WRITING = 3.0
"""Seconds of them that writing may take."""
_OPEN_AT_MOST = 32
_PART_HOURS = 24.0
"""Half-written shards older than this are what a killed process left."""
File = TypeVar("File")


class Unsaved:
    """How long work has been going on that is not on disk."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def is_due(self, coming: float | None = None) -> bool:
        """Called when a piece is done: whether the next one would be done too late to be waited for.

        Args:
            coming: seconds that it will take; None: as many as this one.
        """
        now = time.monotonic()
        piece, self._last = now - self._last, now
        return now - self._began + (piece if coming is None else coming) > LOST_AT_MOST - _WRITING


class ShardStore:
    """A folder of shards, each a safetensors file with some keys; a key is in one shard.

    In memory a key takes 12 bytes. A shard that was cut short or altered is named in the log and removed, so that its
    keys are missing and made again: at the start every header is read, and every shard in full that was not yet, or
    changed since (what was checked is kept in verified.json). A shard that is damaged behind the record's back is
    found when it is first read from. Shards appear whole or not at all; keys added and not flushed are lost with the
    process, at most `LOST_AT_MOST` seconds of work where making one takes less.

    Args:
        folder: of the shards; made when first written to.
        shard_size: keys collected before a shard is written.
    """

    def __init__(self, folder: Path, shard_size: int = 64) -> None:
        self._folder, self._shard_size = folder, shard_size
        self._pending: dict[str, Tensor] = {}
        self._unsaved = Unsaved()
        self._open: OrderedDict[Path, ShardFile] = OrderedDict()
        self._verified: set[Path] = set()
        self._records = Records(folder / "verified.json")
        self.damaged: list[str] = []
        self._paths: list[Path] = []
        self._keys = KeyIndex()
        self._index()

    def __contains__(self, key: str) -> bool:
        return key in self._pending or key in self._keys

    def get(self, key: str) -> Tensor:
        """The tensor of a key, read from its shard.

        Raises:
            KeyError: there is none.
            ValueError: its shard was damaged or removed after the start.
        """
        if key in self._pending:
            return self._pending[key]
        return self._opened(self._paths[self._keys[key]]).tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a key's tensor, without reading it; raises as `get`."""
        if key in self._pending:
            return tuple(self._pending[key].shape)
        return self._opened(self._paths[self._keys[key]]).shape(key)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors that belong together (they go into one shard)."""
        with torch.inference_mode(False):
            copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
            self._pending.update(copies)
        if self._unsaved.is_due() or len(self._pending) >= self._shard_size:
            self.flush()

    def flush(self) -> None:
        """Writes what was added to a new shard."""
        if not self._pending:
            return
        ordered = dict(sorted(self._pending.items()))
        digest = content_digest(ordered.items())
        # The digest in the name keeps two processes that fill one cache from replacing each other's shards.
        path = self._folder / f"{self._next_number():05d}-{digest[:8]}.safetensors"
        write_tensors(path, ordered, {DIGEST: digest})
        self._verified.add(path)
        self._take(path, ordered)
        self._pending = {}
        self._unsaved = Unsaved()

    def _next_number(self) -> int:
        numbers = (path.name[:5] for path in self._folder.glob("*.safetensors"))
        return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1

    def _take(self, path: Path, keys: Iterable[str]) -> None:
        self._paths.append(path)
        self._keys.update(keys, len(self._paths) - 1)

    def _index(self) -> None:
        remove_parts(self._folder, hours=_PART_HOURS)
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with ShardFile(path) as file:
                    keys = file.keys()
                self._records.of(path, path.name, self._verify, lambda found: found is True)
            except Exception as error:  # safetensors raises its own type; whatever it is, the shard is made again
                _LOG.warning("The cached shard %s is damaged (%s): it is removed and made again.", path, error)
                self.damaged.append(path.name)
                path.unlink(missing_ok=True)
            else:
                self._take(path, keys)
        self._records.save()

    def _opened(self, path: Path) -> ShardFile:
        return kept_open(self._open, path, self._opened_first)

    def _opened_first(self, path: Path) -> ShardFile:
        try:
            if path not in self._verified:
                self._verify(path)
            return ShardFile(path)
        except Exception as error:
            self._records.forget(path.name)
            self._records.save()
            raise ValueError(
                f"the cached shard {path} was damaged or removed since the dataset was made ({error}); make the"
                " dataset again (in ComfyUI after a restart): only what that shard held is encoded anew"
            ) from error

    def _verify(self, path: Path) -> bool:
        require_whole(path)
        self._verified.add(path)
        return True


class Stores:
    """Several stores read as one; a key means the same in each.

    Args:
        stores: ShardStore or Stores.
    """

    def __init__(self, *stores: ShardStore | Stores) -> None:
        flat = (inner for store in stores for inner in (store.stores if isinstance(store, Stores) else (store,)))
        self.stores: tuple[ShardStore, ...] = tuple(dict.fromkeys(flat))

    def __contains__(self, key: str) -> bool:
        return any(key in store for store in self.stores)

    def get(self, key: str) -> Tensor:
        """See `ShardStore.get`."""
        return self._with(key).get(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """See `ShardStore.shape`."""
        return self._with(key).shape(key)

    def _with(self, key: str) -> ShardStore:
        for store in self.stores:
            if key in store:
                return store
        raise KeyError(key)


def kept_open(files: OrderedDict[Path, File], path: Path, opened: Callable[[Path], File]) -> File:
    """The open file of a path, by `opened` where `files` does not have it; the 32 used last stay in `files`."""
    if path not in files:
        files[path] = opened(path)
        if len(files) > _OPEN_AT_MOST:
            files.popitem(last=False)
    files.move_to_end(path)
    return files[path]


def require_whole(path: Path) -> None:
    """Reads a shard, a tensor at a time; ValueError if its bytes are not those written, or safetensors' exception."""
    with ShardFile(path) as file:
        if file.metadata.get(DIGEST) != content_digest((key, file.tensor(key)) for key in sorted(file.keys())):
            raise ValueError("its content does not match its checksum")


def content_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex SHA-256 over names, shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for key, tensor in tensors:
        sha.update(json.dumps([key, list(tensor.shape), str(tensor.dtype)]).encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
