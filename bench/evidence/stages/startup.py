"""What the pack adds to ComfyUI's start: the time of its import, and what ComfyUI itself reports."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..comfy import comfy_dir, comfy_python
from ..provenance import ROOT
from ..section import Claim, Section, Table, shown
from ..stage import Context, Result, Stage, number

GOAL = 0.3
_STARTS, _SECONDS = 3, 300
_LOAD = (
    "import importlib.util as u, sys; s = u.spec_from_file_location('diff2flow_nodes', {file!r},"
    " submodule_search_locations=[{folder!r}]); m = u.module_from_spec(s); sys.modules['diff2flow_nodes'] = m;"
    " s.loader.exec_module(m); m.NODE_CLASS_MAPPINGS"
)
_REPORTED = re.compile(r"([\d.]+) seconds[^:\n]*: .*diff2flow_nodes")


def settings(context: Context) -> dict[str, Any]:
    """How often, and whether inside ComfyUI, too."""
    return {"rounds": 3 if context.quick else 7, "comfyui": bool(comfy_dir())}


def run(context: Context) -> Result:
    """Seconds in fresh processes, in turn: python alone, with torch, with the pack's nodes, and these behind torch."""
    load = _LOAD.format(file=str(ROOT / "__init__.py"), folder=str(ROOT))
    timed = f"import time, torch; began = time.perf_counter(); {load}; print(time.perf_counter() - began)"
    ways = {"python": "pass", "torch": "import torch", "pack": load, "pack behind torch": timed}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings(context)["rounds"]):
        for name, code in ways.items():
            seconds[name].append(_seconds(code))
    added = [a - b for a, b in zip(seconds["pack"], seconds["python"], strict=True)]
    found = {"import alone": added, "behind torch": seconds["pack behind torch"]}
    if directory := comfy_dir():
        found["reported by ComfyUI"] = [_reported(directory) for _ in range(_STARTS)]
    numbers = {name: _number(values) for name, values in found.items()}
    return {"seconds": {**seconds, **found}, "numbers": numbers}


def _number(values: list[float]) -> dict[str, float]:
    return number(statistics.median(values), "smaller", statistics.stdev(values), 0.05, len(values), timed=True)


def _seconds(code: str) -> float:
    """Wall seconds of a fresh process; what the code prints instead, if it prints."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    taken = time.perf_counter() - began
    if done.returncode:
        raise ValueError(f"the pack cannot be imported in a fresh python: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.splitlines()[-1]) if done.stdout.strip() else taken


def _reported(directory: Path) -> float:
    """Seconds that ComfyUI's log gives for the pack, in a base folder of its own; it ends when it has started."""
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "custom_nodes").mkdir()
        (Path(base) / "custom_nodes" / "diff2flow_nodes").symlink_to(ROOT)
        command = [str(comfy_python(directory)), "main.py", "--cpu", "--quick-test-for-ci", "--base-directory", base]
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=_SECONDS, env=os.environ.copy(), check=False
        )
    found = _REPORTED.search(done.stdout + done.stderr)
    if not found:
        raise ValueError(f"ComfyUI's log names no import time of the pack: {(done.stdout + done.stderr)[-300:]}")
    return float(found.group(1))


def render(result: Result) -> Section:
    """Medians, and the goal."""
    names = {
        "import alone": "the nodes loaded as ComfyUI loads them, torch and all, less python's own start",
        "behind torch": "the same where torch is imported already, as in ComfyUI",
        "reported by ComfyUI": "as ComfyUI reports it at its start",
    }
    numbers = result["numbers"]
    rows = [(names[name], shown(cell), str(cell["seeds"])) for name, cell in numbers.items()]
    name = "reported by ComfyUI" if "reported by ComfyUI" in numbers else "behind torch"
    text = "seconds added to ComfyUI's start" + (
        "" if name.startswith("reported") else " (import where torch is there)"
    )
    claim = Claim(text, f"{shown(numbers[name])} s", f"≤ {GOAL} s", numbers[name]["value"] <= GOAL, main=True)
    return Section([claim], (Table("Start-up (median ± deviation)", ("what", "seconds", "rounds"), rows),))


STAGE = Stage(
    "startup",
    "Start-up",
    2,
    (1.5, 1.0),
    run,
    render,
    settings=settings,
    alone=True,
)
