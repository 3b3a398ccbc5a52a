"""Reflow of SD1.5 at its full size in the real ComfyUI: needs COMFYUI_DIR and, for its 2 GB of weights, D2F_FULL_SIZE.

    COMFYUI_DIR=path/to/ComfyUI D2F_FULL_SIZE=1 make test

D2F_FULL_SIZE may be a folder: the checkpoint is kept there. It takes 90 seconds on two cores and 8 GB of memory.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from comfy_graphs import Graph, base, ksampler, node, reflow, saved
from comfy_server import ComfyServer, comfy_dir
from test_comfy_host import pixels, record

from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.training.lora_file import load_lora

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(
        comfy_dir() is None or not os.environ.get("D2F_FULL_SIZE"), reason="needs COMFYUI_DIR and D2F_FULL_SIZE=1"
    ),
]

CHECKPOINT, NAME = "sd15.safetensors", "small"
TRAINED = (".lora_up.weight", ".diff", ".diff_b")
"""Endings of a LoRA file's keys, one for each weight that it changes."""
COUNT = """
class CountPatches:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "count", True, "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def count(self, model):
        weights = sum(weight.numel() for weight in model.model.diffusion_model.parameters())
        return {"ui": {"patches": [len(each) for each in model.patches.values()], "weights": [weights]}}

NODE_CLASS_MAPPINGS = {"CountPatches": CountPatches}
"""
"""A custom node of the tests: how many patches each patched weight has, and how many parameters the network."""


def trained() -> Graph:
    graph = reflow(base(CHECKPOINT), {"recipe": "fast"}, NAME, steps=1, batch_size=1, memory_check=True)
    graph["pairs"]["inputs"].update(count=2, steps=2)
    graph["lora"]["inputs"]["preset"] = "paper-small"
    return graph


def loaded() -> Graph:
    graph = base(CHECKPOINT, batch=1)
    graph["tuned"] = node(
        "LoraLoader", model=["ckpt", 0], clip=["ckpt", 1], lora_name=f"{NAME}.safetensors", strength_model=1.0,
        strength_clip=1.0,
    )  # fmt: skip
    graph["count"] = node("CountPatches", model=["tuned", 0])
    graph["sample"] = ksampler(["tuned", 0], steps=1)
    return saved(graph, "sample", "tuned_image")


def test_a_reflowed_lora_of_the_full_network(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One step of preset paper-small on two pairs; stock LoraLoader takes every key of the file."""
    server = ComfyServer(comfy_dir(), tmp_path)
    (tmp_path / "custom_nodes" / "count_patches.py").write_text(COUNT)
    kept = Path(os.environ["D2F_FULL_SIZE"])
    checkpoint = (kept if kept.is_dir() else tmp_path) / "sd15_random.safetensors"
    if not checkpoint.exists():
        build_random(checkpoint, levels=4, blocks=2)
    (tmp_path / "models" / "checkpoints" / CHECKPOINT).symlink_to(checkpoint)
    with server:
        began = time.monotonic()
        server.run(trained())
        seconds, peak = time.monotonic() - began, server.memory(peak=True)
        began = time.monotonic()
        shown = server.outputs(loaded())
        sampled, whole_peak = time.monotonic() - began, server.memory(peak=True)
    state, metadata = load_lora(tmp_path / "models" / "loras" / f"{NAME}.safetensors")
    changed = sum(key.endswith(TRAINED) for key in state)
    patches, [weights] = shown["count"]["patches"], shown["count"]["weights"]
    record(
        request, training_seconds=seconds, training_peak_mb=peak, sampling_seconds=sampled, whole_peak_mb=whole_peak,
        keys=len(state), changed_weights=changed, patches=sum(patches), network_parameters=weights,
    )  # fmt: skip
    assert 859e6 < weights < 861e6 and metadata["diff2flow.recommended_steps"] == "4"
    assert len(patches) == sum(patches) == changed > 0
    assert "lora key not loaded" not in server.log.read_text(errors="replace")
    assert pixels(server.files(shown["tuned_image"])).std() > 5
