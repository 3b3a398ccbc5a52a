"""Tells of every file that appears whole: `files.written_whole` says so in an audit event, and this hears of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import WRITTEN


def announce(report: Callable[[Path], None], *folders: Path) -> None:
    """Calls `report` with the path of each file that `written_whole` finishes under `folders`, from now on.

    Files are told of at once, whoever writes them, also before an interruption. Audit hooks stay until the process
    ends.
    """
    roots = [folder.resolve() for folder in folders]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event != WRITTEN:
            return
        path = Path(arguments[0])
        if any(path.resolve().is_relative_to(root) for root in roots):
            report(path)

    sys.addaudithook(hear)
