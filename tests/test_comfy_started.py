"""How a measurement starts ComfyUI: as its main.py does, shown on one that only writes down who was called when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
_FILES = {
    "cuda_malloc.py": "print('allocator')",
    "comfy/__init__.py": "",
    "comfy/options.py": "def enable_args_parsing(): pass",
    "comfy/cli_args.py": """
import sys
class args: vram_headroom = 0.5
def enables_dynamic_vram(): return "--disable-dynamic-vram" not in sys.argv and "--cpu" not in sys.argv
""",
    "comfy/memory_management.py": "aimdo_enabled = False",
    "comfy/model_patcher.py": """
class ModelPatcher: pass
class ModelPatcherDynamic(ModelPatcher): pass
CoreModelPatcher = ModelPatcher
""",
    "comfy/model_management.py": """
print("torch")
class Device: index = 1
def get_all_torch_devices(): return [Device]
""",
    "comfy_aimdo/__init__.py": "",
}
_NEW = """
def init(nvml_pressure=False): print("library", nvml_pressure)
def init_devices(devices): print("devices", list(devices)); return True
"""
_OLD = """
def init(): print("library")
def init_devices(devices):
    devices = list(devices)
    if isinstance(devices[0], tuple): raise TypeError("an index")
    print("devices", devices)
    return True
"""
_SCRIPT = """
import sys, types
sys.path.insert(0, {bench!r})
import comfy_process
import comfy.memory_management as m
print("dynamic", comfy_process.dynamic_vram(), m.aimdo_enabled, sys.argv[1:])
"""


def _started(folder: Path, protocol: str, *words: str) -> list[str]:
    for name, text in {**_FILES, "comfy_aimdo/control.py": protocol}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-c", _SCRIPT.format(bench=str(BENCH)), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COMFYUI_DIR": str(folder)}, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("protocol", "first", "devices"), [(_NEW, "library True", "[(1, 536870912)]"), (_OLD, "library", "[1]")]
)
def test_on_a_gpu_dynamic_vram_begins_before_torch(tmp_path, protocol, first, devices):
    lines = _started(tmp_path, protocol, "--device", "cuda")
    assert lines == ["allocator", first, "torch", f"devices {devices}", "dynamic True True []"]


def test_dynamic_vram_can_be_left_out(tmp_path):
    lines = _started(tmp_path, _NEW, "--device", "cuda", "--disable-dynamic-vram")
    assert lines == ["allocator", "torch", "dynamic False False ['--disable-dynamic-vram']"]


def test_the_cpu_has_none(tmp_path):
    assert _started(tmp_path, _NEW, "5", "4") == ["torch", "dynamic False False ['--cpu']"]
