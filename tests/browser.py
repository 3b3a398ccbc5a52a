"""A headless Chromium for the tests, where Playwright and a Chromium are installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def chromium() -> str | None:
    """Path of a Chromium: CHROMIUM, else what is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def missing() -> str:
    """Why no browser can be driven here; "" where one can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "needs Playwright: pip install playwright"
    return "" if chromium() else "needs Chromium: install it, or set CHROMIUM to its path"


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's Browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


class Page:
    """A page of the browser that remembers what went wrong on it.

    Args:
        opened: Playwright's Browser.
        width, height: of the window, pixels.
    """

    def __init__(self, opened: Any, width: int = 480, height: int = 760) -> None:
        self.page = opened.new_page(viewport={"width": width, "height": height})
        self.complaints: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("dialog", lambda dialog: dialog.accept())  # "leave this page?" at a reload
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} ({message.location.get('url', '')})")
