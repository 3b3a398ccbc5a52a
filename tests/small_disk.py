"""A folder that is a small disk: what does not fit is refused when it is flushed, as file systems do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diff2flow_nodes import files


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


class SmallDisk:
    """Has `capacity` bytes for all files in a folder; may be changed. The rest of the machine has as much as ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, capacity: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.capacity = folder, capacity
        self._fsync, self._usage = os.fsync, shutil.disk_usage
        monkeypatch.setattr(files.os, "fsync", self._flushed)
        monkeypatch.setattr(files.shutil, "disk_usage", self._asked)

    @property
    def used(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def _flushed(self, descriptor: int) -> None:
        node = os.fstat(descriptor).st_ino
        if self.used > self.capacity and any(path.stat().st_ino == node for path in self._files()):
            raise OSError(errno.ENOSPC, "No space left on device")
        self._fsync(descriptor)

    def _asked(self, path: Any) -> Any:
        if Path(path) == self.folder or self.folder in Path(path).parents:
            return _Usage(self.capacity, self.used, max(0, self.capacity - self.used))
        return self._usage(path)
