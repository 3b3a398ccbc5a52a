"""Where the real ComfyUI is: COMFYUI_DIR, and the python that runs it; what is measured inside it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from ..random_prior import build_random
from .provenance import ROOT
from .stage import Context

_SECONDS = 3600


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


def random_checkpoint(context: Context) -> Path:
    """A slim SD1.5 of random weights that ComfyUI loads, in a models folder of its own; made if need be."""
    path = context.folder("comfy") / "models" / "checkpoints" / "random.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        build_random(path)
    return path


def in_comfy(context: Context, script: str, *words: str) -> dict[str, Any]:
    """JSON that a script of bench prints under ComfyUI's own python, about the random checkpoint.

    Args:
        script: file in bench.
        words: behind the checkpoint.

    Raises:
        ValueError: COMFYUI_DIR is not set, or the script failed.
    """
    directory = comfy_dir()
    if directory is None:
        raise ValueError("COMFYUI_DIR is not set: name the checkout of ComfyUI by it")
    command = [str(comfy_python(directory)), str(ROOT / "bench" / script), str(random_checkpoint(context)), *words]
    command += [] if context.device == "cpu" else ["--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=_alone(), check=False)
    if done.returncode:
        raise ValueError(f"{script} ended with code {done.returncode}: {' '.join(done.stderr.split())[-250:]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def median_seconds(case: dict[str, Any]) -> dict[str, float]:
    """Of each way of a case of `sampling_cost.py`: CPU seconds, or the GPU's own where it ran on one."""
    return case.get("median_cpu_seconds") or case["median_seconds"]


def unit(result: dict[str, Any]) -> str:
    """What a result's seconds are, as a table is headed."""
    return "CPU seconds" if result.get("device", "cpu") == "cpu" else "Seconds of the GPU"


def _alone() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
