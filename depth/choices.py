"""What can be chosen by name where the code that acts on it is needed for nothing else before a node runs."""

from __future__ import annotations

LAYOUTS = ("auto", "folders", "hypersim", "vkitti2")
UNITS = ("auto", "metres", "millimetres", "centimetres")
REDUCTIONS = ("median", "mean")
SPACES = ("log", "depth", "disparity")
