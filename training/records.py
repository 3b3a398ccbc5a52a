"""What is known of files from an earlier look, so that a large folder is not read again at every start."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import written_whole

_LOG = logging.getLogger(__name__)
_SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within one tick of its clock: nothing is recorded of it."""


class Records:
    """Facts about files, each valid while its file's size and time of change stay; kept in a JSON file.

    Args:
        path: of the JSON file; one that cannot be read counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)
        self._kept: dict[str, list[Any]] = {}

    def of(self, file: Path, name: str, look: Callable[[Path], Any], fits: Callable[[Any], bool]) -> Any:
        """The facts about a file: those recorded under `name`, else what `look` returns (JSON values).

        Recorded facts for which `fits` is false are not of the form that `look` returns: they are looked for again.

        Raises:
            OSError: the file cannot be found.
            Exception: what `look` raises; nothing is recorded then.
        """
        stamp = _stamp(file)
        known = self._known.get(name)
        if known is None or known[:2] != stamp or not fits(known[2]):
            known = [*stamp, look(file)]
            if time.time_ns() - stamp[1] <= _SETTLED_NS:
                return known[2]
        self._kept[name] = known
        return known[2]

    def holds(self, file: Path, name: str) -> bool:
        """Whether the facts about a file are recorded and valid."""
        known = self._known.get(name)
        return known is not None and file.exists() and known[:2] == _stamp(file)

    def forget(self, name: str) -> None:
        """Makes the next look at a file a real one."""
        self._kept.pop(name, None)

    def save(self) -> None:
        """Writes the facts about the files that were asked for, if they are not what the JSON file holds."""
        if self._kept != self._known:
            try:
                with written_whole(self._path) as temporary:
                    temporary.write_text(json.dumps(self._kept), encoding="utf-8")
            except (OSError, ValueError) as error:  # nothing is lost but time
                _LOG.warning("The record %s cannot be written (%s): every file is looked at again.", self._path, error)
            self._known = dict(self._kept)


def _stamp(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def _read(path: Path) -> dict[str, list[Any]]:
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: facts for name, facts in known.items() if isinstance(facts, list) and len(facts) == 3}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        _LOG.warning("The record %s cannot be read (%s): every file is looked at again.", path, error)
        return {}
