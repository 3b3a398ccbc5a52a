"""What holds for every test, and what several files share."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from browser import browser

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what it starts in the background; tests of Ctrl-C want it, in what they start as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers in every run, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    """A headless Chromium, Playwright's Browser."""
    with browser() as running:
        yield running
