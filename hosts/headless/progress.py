"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ...files import writes


class TqdmProgress:
    """A bar of the running node, in the process that writes; the port's Progress. Previews cannot be shown here."""

    def __init__(self, total: int, title: str) -> None:
        self._bar = tqdm(total=total, desc=title, dynamic_ncols=True, disable=not writes())

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        """Moves the bar to `done`, with a short text behind it. Ctrl-C interrupts by itself."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def event(self, entry: Mapping[str, Any]) -> None:
        """There is no page."""

    def command(self) -> str:
        """Nobody asks for anything: Ctrl-C saves and stops."""
        return ""

    def close(self) -> None:
        """Ends the bar, its last state stays on the screen."""
        self._bar.close()
