"""ComfyUI's modules and this pack in one process, without the server: for checks and measurements inside ComfyUI.

Runs under ComfyUI's own python, with COMFYUI_DIR set; importing this module starts ComfyUI, on the CPU unless the
script was given `--device cuda`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

PACK = Path(__file__).resolve().parent.parent


def _start_comfy() -> None:
    """ComfyUI reads its options from sys.argv while it is imported: it gets the device, and its checkout's path."""
    sys.argv[1:] = [] if DEVICE == "cuda" else ["--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401


def _load_pack() -> ModuleType:
    """The pack as the package diff2flow_nodes, from this folder whatever its name."""
    spec = importlib.util.spec_from_file_location(
        "diff2flow_nodes", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["diff2flow_nodes"] = module
    spec.loader.exec_module(module)
    return module


arguments = sys.argv[1:]
DEVICE = arguments[arguments.index("--device") + 1] if "--device" in arguments else "cpu"
_start_comfy()
pack = _load_pack()
