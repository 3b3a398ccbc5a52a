"""One process at a time: a file that the system itself unlocks when its process ends, however it ends."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from .manifest import parsed

_LOG = logging.getLogger(__name__)
_PLACE = 1 << 30
"""Byte that is locked on Windows, which keeps others from reading what is locked: far behind what the file says."""


class Lock:
    """Held until it is closed, or the process is gone; the file stays, and says who holds it.

    Args:
        path: of the file; made with its folder.
        what: is done by who holds it, for the message: "the run 'ink' is trained".
        instead: what whoever comes second can do.

    Raises:
        ValueError: another process holds it; says which, where and since when.
    """

    def __init__(self, path: Path, what: str, instead: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  (closed by close)
        try:
            _take(self._file)
        except _HELD as error:
            self._file.close()
            raise ValueError(f"{what} at this moment by {_holder(path)}; {instead}") from error
        except OSError as error:  # some network drives have no locks
            _LOG.warning("%s cannot be locked (%s): do not start the same twice at the same time.", path, error)
        self._say()

    def close(self) -> None:
        """Lets the next one in."""
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self) -> None:
        """Who holds it; a full disk has no room for that, and locks all the same."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}).encode())
        except OSError as error:
            _LOG.warning("%s does not say who holds it: %s", self._file.name, error)


def _holder(path: Path) -> str:
    try:
        holder = parsed(path.read_text(encoding="utf-8"), 1, {"pid": int, "host": str, "since": str})
    except (OSError, ValueError):
        return "another process"
    return f"process {holder['pid']} on {holder['host'][:80]!r} (since {holder['since'][:20]})"


if sys.platform == "win32":
    import msvcrt

    _HELD: tuple[type[OSError], ...] = (PermissionError, BlockingIOError)

    def _take(file: IO[bytes]) -> None:
        os.lseek(file.fileno(), _PLACE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    _HELD = (BlockingIOError,)

    def _take(file: IO[bytes]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
