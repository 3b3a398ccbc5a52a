"""Tells of every file that appears whole: `files.written_whole` renames it into place, and this hears of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PART = ".part"


def announce(report: Callable[[Path], None], *folders: Path) -> None:
    """Calls `report` with the path of each file that `written_whole` finishes under `folders`, from now on.

    It listens to Python's audit event of a rename, so files are told of at once, whoever writes them, also before an
    interruption. Audit hooks stay until the process ends.
    """
    roots = [folder.resolve() for folder in folders]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "os.rename" or not os.fspath(arguments[0]).endswith(_PART):
            return
        path = Path(os.fspath(arguments[1]))
        if any(path.resolve().is_relative_to(root) for root in roots):
            report(path)

    sys.addaudithook(hear)
