"""The phases inside ComfyUI: a process of its own, whose findings come in as they are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Timer

from ..evidence.comfy import comfy_dir, comfy_python
from .setting import COMFY, FULL, SLIM, Setting

_SCRIPT = Path(__file__).with_name("inside_comfy.py")
_GRACE = 30.0
"""Seconds that the process has to end after its budget."""


def dynamic(setting: Setting) -> None:
    """Sampling and training in ComfyUI as its main.py starts it: with dynamic VRAM where it has that."""
    _inside(setting)


def plain(setting: Setting) -> None:
    """The same without dynamic VRAM, on a pretended card of 8 GiB."""
    if setting.small:
        setting.findings.skip("comfy_plain", "needs a card")
        return
    _inside(setting, "--disable-dynamic-vram", "--card", "8")


def _inside(setting: Setting, *words: str) -> None:
    directory = comfy_dir()
    if directory is None:
        setting.findings.skip("comfy", "COMFYUI_DIR is not set")
        return
    names = [COMFY, COMFY] if setting.small else [FULL, SLIM]
    names = [setting.checkpoint(name) for name in names]
    command = [_python(directory), str(_SCRIPT), str(setting.folder), *names, *words]
    command += ["--seconds", str(setting.findings.left), *([] if setting.small else ["--device", "cuda"])]
    errors = setting.findings.folder / "comfy_err.txt"
    with open(errors, "a", encoding="utf-8") as told:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True, env=dict(os.environ))
        clock = Timer(max(0.0, setting.findings.left) + _GRACE, process.kill)
        clock.start()
        try:
            _listen(setting, process)
        finally:
            clock.cancel()
            process.kill()
    if process.wait():
        last = " ".join(errors.read_text(encoding="utf-8", errors="replace").split())[-300:]
        raise RuntimeError(f"ComfyUI's process ended with code {process.returncode}: {last}")


def _listen(setting: Setting, process: subprocess.Popen[str]) -> None:
    """Takes over its findings until it ends; what else it prints is nothing to us."""
    for line in process.stdout or ():
        if line.startswith("{"):
            found = json.loads(line)
            if found.get("kind") in ("finding", "failed", "skipped"):
                setting.findings.take(found)
    process.wait()


def _python(directory: Path) -> str:
    """ComfyUI's own, or this one where it has none."""
    try:
        return str(comfy_python(directory))
    except ValueError:
        return sys.executable
