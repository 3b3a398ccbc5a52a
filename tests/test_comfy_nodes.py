"""The sampling nodes inside ComfyUI's own process; needs COMFYUI_DIR."""

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

SCRIPT = Path(__file__).with_name("inside_comfy.py")
CHECKS = re.findall(r"^def check_(\w+)\(", SCRIPT.read_text(), re.MULTILINE)

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]


@lru_cache(maxsize=1)
def results() -> dict[str, Any]:
    """All checks, run once."""
    directory = comfy_dir()
    command = [str(comfy_python(directory)), str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=dict(os.environ))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, f"the checks did not end:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(lines[-1].removeprefix("RESULTS "))


@pytest.mark.parametrize("check", CHECKS)
def test_inside_comfy(check: str) -> None:
    result = results()[check]
    assert result["ok"], result["found"]
