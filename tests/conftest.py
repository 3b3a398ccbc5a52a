"""What holds for every test."""

import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what it starts in the background; tests of Ctrl-C want it, in what they start as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers in every run, alone or among others."""
    torch.manual_seed(0)
