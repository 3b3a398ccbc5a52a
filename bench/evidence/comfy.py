"""Where the real ComfyUI is: COMFYUI_DIR, and the python that runs it."""

from __future__ import annotations

import os
from pathlib import Path

from .stage import Context


def comfy_dir() -> Path | None:
    """The checkout that COMFYUI_DIR names, None without it."""
    value = os.environ.get("COMFYUI_DIR")
    return Path(value) if value else None


def comfy_python(directory: Path) -> Path:
    """COMFYUI_PYTHON, or the python of a virtual environment in the checkout.

    Args:
        directory: of the checkout.

    Raises:
        ValueError: there is none.
    """
    chosen = os.environ.get("COMFYUI_PYTHON")
    candidates = [Path(chosen)] if chosen else [directory / name / "bin" / "python" for name in (".venv", "venv")]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ValueError(f"no python for ComfyUI: {', '.join(map(str, candidates))} is not there; set COMFYUI_PYTHON")


def without_comfy(context: Context) -> str:
    """Why what needs the real ComfyUI is left out, "" where it is not."""
    return "" if comfy_dir() else "COMFYUI_DIR is not set"
