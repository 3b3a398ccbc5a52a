"""ComfyUI's TrainLoraNode, and the bare peft step on ComfyUI's own UNet; under ComfyUI's python:

COMFYUI_DIR=... python bench/peers/comfyui.py train_lora_node|bare CHECKPOINT
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training_ways import EQUAL, Material, bare, theirs  # noqa: E402  (starts ComfyUI)

# isort: split
import comfy.utils  # noqa: E402
from comfy_process import arguments  # noqa: E402

from diff2flow_nodes.bench.peers.worker import SIDE, serve  # noqa: E402


def main() -> None:
    """Serves one of them."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    name, checkpoint = arguments[:2]
    material = Material.of(Path(checkpoint), SIDE)
    serve(partial(bare, material) if name == "bare" else lambda steps: theirs(material, steps, EQUAL))


if __name__ == "__main__":
    main()
