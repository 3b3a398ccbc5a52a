"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers in every run, alone or among others."""
    torch.manual_seed(0)
