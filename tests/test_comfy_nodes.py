"""Sampling and training inside ComfyUI's own process; needs COMFYUI_DIR."""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from comfy_server import comfy_dir, comfy_python

PARTS = ("", "_loras", "_patches", "_training", "_identity")
SCRIPTS = [Path(__file__).with_name(f"inside_comfy{part}.py") for part in PARTS]
CHECKS = [
    (script, check)
    for script in SCRIPTS
    for check in re.findall(r"^def check_(\w+)\(", script.read_text(), re.MULTILINE)
]

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]


@lru_cache(maxsize=len(SCRIPTS))
def results(script: Path) -> dict[str, Any]:
    """All checks of a script, run once."""
    directory = comfy_dir()
    command = [str(comfy_python(directory)), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=dict(os.environ))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, f"the checks did not end:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(lines[-1].removeprefix("RESULTS "))


@pytest.mark.parametrize(("script", "check"), CHECKS, ids=[check for _, check in CHECKS])
def test_inside_comfy(script: Path, check: str) -> None:
    result = results(script)[check]
    assert result["ok"], result["found"]
