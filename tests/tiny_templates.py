"""The templates at sizes at which they run in seconds, and what they want to find on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diff2flow_nodes.bench.templates import api_graph
from diff2flow_nodes.tests.depth_pairs import write_image, write_pairs

CHECKPOINT = "your_sd15_checkpoint.safetensors"
SIDE = 64
_SQUARE = {"width": SIDE, "height": SIDE}
TINY: dict[str, dict[str, Any]] = {
    "EmptyLatentImage": {**_SQUARE, "batch_size": 1},
    "EmptyImage": _SQUARE,
    "Diff2FlowImageDataset": {"resolution": SIDE},
    "Diff2FlowDepthDataset": {"resolution": SIDE},
    "Diff2FlowImages": {"repeats": 1},
    "Diff2FlowReflowPairs": {**_SQUARE, "count": 4, "steps": 2},
    "Diff2FlowTrain": {"steps": 2},
    "Diff2FlowTrainWatch": {**_SQUARE, "sample_steps": "1"},
    "Diff2FlowStepsGrid": {"step_counts": "1, 2"},
    "Diff2FlowStraightness": {"steps": 2},
    "Diff2FlowSampler": {"steps": 2},
    "Diff2FlowDepth": {"ensemble": 2},
}
"""Inputs by class; links stay."""
NEEDS = {"few_steps": "reflow", "depth_estimation": "depth_training"}
"""Templates that use the LoRA of another."""
LORAS = {
    "finetune_and_sample": "my_style",
    "reflow": "my_straight_lora",
    "depth_training": "my_depth_lora",
    "resolution_adaptation": "my_size_lora",
    "black_white": "my_black_white_lora",
}
PICTURES = {
    "few_steps": ("few_steps/image", "few_steps/steps", "few_steps/own_sampler"),
    "finetune_and_sample": ("finetune/loss", "finetune/before", "finetune/after", "finetune/image"),
    "reflow": ("reflow/before", "reflow/after", "reflow/straightness_before", "reflow/straightness_after"),
    "depth_estimation": ("depth/picture",),
    "depth_training": ("depth_training/loss",),
    "resolution_adaptation": ("resolution/loss", "resolution/before", "resolution/after"),
    "black_white": (
        "black_white/loss",
        *(f"black_white/{colour}_{when}" for colour in ("black", "white") for when in ("before", "after")),
    ),
}
"""Beginnings of the files that each saves in the output folder."""


def tiny(name: str, seed: int | None = None) -> dict[str, Any]:
    """A template's API graph with tiny sizes; another seed lets ComfyUI do everything again."""
    graph = api_graph(name)
    for entry in graph.values():
        changes = dict(TINY.get(entry["class_type"], {}))
        if seed is not None and "seed" in entry["inputs"]:
            changes["seed"] = seed
        entry["inputs"] |= {
            key: value for key, value in changes.items() if not isinstance(entry["inputs"].get(key), list)
        }
    return graph


def write_inputs(folder: Path) -> None:
    """Images, pairs of image and depth, and an image, under the names of the templates."""
    for number in range(4):
        write_image(folder / "my_images" / f"{number}.png", number)
    write_pairs(folder / "my_depth", 4)
    if not (folder / "example.png").exists():
        write_image(folder / "example.png", 7, (56, 64))
