"""What a run finds: a line of JSON each, on stdout and in a file, so that nothing is lost when the run is cut off."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FRAMES, _WORDS = 5, 400
_DIGITS = 5
"""Significant digits of what is written."""


class Findings:
    """The findings of a run.

    A line has "at" (seconds since the start), "phase", "kind" and what was found. Kinds: "finding"; "failed", with the
    exception and its last frames; "skipped", with the reason; "took", the seconds of a phase.

    Args:
        path: of the file that the lines are added to.
        seconds: that the run may take; what has not begun by then is skipped.

    Attributes:
        failed, skipped: what was, by name.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._seconds, self._began = path, seconds, time.monotonic()
        self._phase = ""
        self.failed: list[str] = []
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._seconds - (time.monotonic() - self._began)

    @property
    def folder(self) -> Path:
        """Where the file is."""
        return self._path.parent

    def tell(self, kind: str = "finding", **found: Any) -> None:
        """Writes a line of the phase that runs."""
        line = {"at": time.monotonic() - self._began, "phase": self._phase, "kind": kind, **found}
        text = json.dumps(_rounded(line), default=str)
        print(text, flush=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def take(self, line: Mapping[str, Any]) -> None:
        """Takes over a line of another process into the phase that runs."""
        found = {name: value for name, value in line.items() if name not in ("at", "phase", "kind")}
        kept = {"failed": self.failed, "skipped": self.skipped}.get(line["kind"])
        if kept is not None:
            kept.append(f"{self._phase}: {found['what']}")
        self.tell(line["kind"], **found)

    def phase(self, name: str, run: Callable[[], None]) -> None:
        """Runs a phase, or skips it where the time is used up; whatever it raises is told and the next one goes on."""
        self._phase, began, worked = name, time.monotonic(), time.process_time()
        if self.left <= 0:
            self.skip(name, "the time is used up")
            return
        with self.guarded(name):
            run()
        self.tell("took", seconds=time.monotonic() - began, cpu_seconds=time.process_time() - worked)

    def skip(self, what: str, reason: str) -> None:
        """Names what is not measured."""
        self.skipped.append(what)
        self.tell("skipped", what=what, reason=reason)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails inside is told with the last frames, and does not go further."""
        try:
            yield
        except Exception as error:  # whatever a card can come up with: the other phases are worth their minutes
            self.failed.append(what)
            frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
            where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            said = " ".join(str(error).split())[:_WORDS]
            self.tell("failed", what=what, error=f"{type(error).__name__}: {said}", where=where)

    def case(self, what: str, run: Callable[[], Mapping[str, Any]], **about: Any) -> None:
        """A case of a phase: what it returns is told beside what it is about; skipped where the time is used up."""
        if self.left <= 0:
            self.skip(what, "the time is used up")
            return
        with self.guarded(what):
            self.tell(**about, **run())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of findings; a last line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict) and "kind" in line]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value
