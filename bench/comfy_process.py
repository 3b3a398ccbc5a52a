"""ComfyUI's modules and this pack in one process, without the server: for checks and measurements inside ComfyUI.

Runs under ComfyUI's own python, with COMFYUI_DIR set; importing this module starts ComfyUI, on the CPU unless the
script was given `--device cuda`. There it starts as its main.py does, with CUDA's own allocator and dynamic VRAM where
this ComfyUI has them; `--disable-dynamic-vram` is handed on.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

log = logging.getLogger(__name__)
PACK = Path(__file__).resolve().parent.parent
_HANDED_ON = "--disable-dynamic-vram"


def _start_comfy() -> None:
    """ComfyUI reads its options from sys.argv while it is imported: it gets the device, and its checkout's path."""
    sys.argv[1:] = [word for word in arguments if word == _HANDED_ON] if DEVICE == "cuda" else ["--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    import comfy.options

    comfy.options.enable_args_parsing()
    if DEVICE == "cuda":
        import cuda_malloc  # noqa: F401  (chooses the allocator, before torch is imported)
    wanted = DEVICE == "cuda" and _wants_dynamic_vram()
    import comfy.model_management  # noqa: F401

    if wanted:
        _enable_dynamic_vram()


def _wants_dynamic_vram() -> bool:
    """Whether this ComfyUI has dynamic VRAM and is to use it; its library is then started, before torch is imported."""
    import comfy.cli_args

    if not getattr(comfy.cli_args, "enables_dynamic_vram", lambda: False)():
        return False
    import comfy_aimdo.control

    try:
        comfy_aimdo.control.init(nvml_pressure=True)
    except TypeError:  # its older protocols
        comfy_aimdo.control.init()
    return True


def _enable_dynamic_vram() -> None:
    """Models are from now on loaded page by page, as main.py arranges it on NVIDIA's cards."""
    import comfy.cli_args
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    headroom = int(getattr(comfy.cli_args.args, "vram_headroom", 0) * 1024**3)
    indices = [device.index for device in comfy.model_management.get_all_torch_devices()]
    try:
        started = comfy_aimdo.control.init_devices((index, headroom) for index in indices)
    except TypeError:  # comfy-aimdo before 0.4.10
        started = comfy_aimdo.control.init_devices(iter(indices))
    if not started:
        log.warning("ComfyUI's dynamic VRAM could not be started on this device")
        return
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def dynamic_vram() -> bool:
    """Whether ComfyUI loads models page by page in this process."""
    import comfy.model_patcher

    core = getattr(comfy.model_patcher, "CoreModelPatcher", None)
    return core is not None and core is getattr(comfy.model_patcher, "ModelPatcherDynamic", None)


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
