"""What a run says of itself while it runs: JSON lines, TensorBoard, and events for the page."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ..files import written_whole
from .manifest import parsed
from .port import Progress

_LOG = logging.getLogger(__name__)
LOG = "log.jsonl"
_FLUSH_SECONDS, _EVENT_SECONDS = 1.0, 0.25


class Sink(Protocol):
    """Takes entries {"kind": ..., "step": ..., numbers and names}."""

    def add(self, entry: Mapping[str, Any]) -> None:
        """One more entry."""

    def flush(self) -> None:
        """What was added is on disk."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines:
    """log.jsonl: one entry a line, on disk about a second after it happened.

    Args:
        path: of the file.
        step: entries of later steps, from a run that was killed after its last state, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line, of_step in _lines(path) if of_step <= step] if step else []
        with written_whole(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._path, self._flushed, self._told = path, time.monotonic(), False
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends a line."""
        with self._going_on():
            self._file.write(json.dumps(entry) + "\n")
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hands what was added to the system."""
        with self._going_on():
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        with self._going_on():
            self._file.close()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A full disk ends no training: it is told once, and what the log lacks is lost."""
        try:
            yield
        except OSError as error:
            if not self._told:
                _LOG.warning("The log %s has gaps: %s", self._path, error)
            self._told = True


class TensorBoard:
    """Event files for TensorBoard, one scalar for each number of an entry.

    Args:
        folder: of the event files.
        step: events of later steps are hidden (purged).

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard is on, but the package 'tensorboardX' is not installed: run 'pip install tensorboardX' in"
                " ComfyUI's python and restart, or switch it off"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Writes the numbers of an entry under "kind/name"."""
        for name, value in entry.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{entry['kind']}/{name}", value, entry["step"])

    def flush(self) -> None:
        """Hands what was added to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()


class Events:
    """Entries sent to the page, at most four steps a second; everything else at once."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._sent = progress, -_EVENT_SECONDS
        self._held: Mapping[str, Any] | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Sends an entry; a step is held back if another was sent just now, and the last of them goes before others."""
        if entry["kind"] == "step":
            now = time.monotonic()
            if now - self._sent < _EVENT_SECONDS:
                self._held = entry
                return
            self._held, self._sent = None, now
        elif self._held is not None:
            self._progress.event(self._held)
            self._held = None
        self._progress.event(entry)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is left open."""


@contextmanager
def failure_told(progress: Progress) -> Iterator[None]:
    """The page hears of what ends the context early."""
    try:
        yield
    except BaseException as error:
        progress.event({"kind": "failed", "error": type(error).__name__, "message": str(error)})
        raise


def clock(seconds: float) -> str:
    """ "1:02:03"."""
    left = round(seconds)
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """The entries of a log with their steps; a line that was cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        with suppress(ValueError):
            yield line, parsed(line, 1, {"kind": str, "step": int})["step"]
