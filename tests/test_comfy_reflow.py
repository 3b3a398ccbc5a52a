"""Reflow in the real ComfyUI server, from the pairs to the images of few steps; needs COMFYUI_DIR."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_graphs import Graph, base, node, reflow
from comfy_server import ComfyServer, comfy_dir
from test_comfy_host import pixels

from diff2flow_nodes.bench.random_prior import build_random

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]

CHECKPOINT = "random.safetensors"
RECIPES = {
    "fast": {"recipe": "fast"},
    "paper": {"recipe": "paper"},
    "windows": {"recipe": "windows", "windows": 2, "window_steps": 2},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    with running:
        yield running


def lora_file(server: ComfyServer, name: str) -> Path:
    return server.base / "models" / "loras" / f"{name}.safetensors"


def loaded(name: str) -> Graph:
    """Checkpoint, prompts, and the node `tuned`: the LoRA through our loader."""
    graph = base(CHECKPOINT)
    graph["tuned"] = node("Diff2FlowLoraLoader", model=["ckpt", 0], lora_name=f"{name}.safetensors", strength=1.0)
    return graph


def looked_at(name: str) -> Graph:
    """The LoRA with the nodes that show it: `grid`, `plot` and `walked` save pictures, the others show a text."""
    graph = loaded(name)
    sampling: dict[str, Any] = {
        "model": ["tuned", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0],
        "seed": 5, "cfg": ["tuned", 2],
    }  # fmt: skip
    graph["draw"] = node("Diff2FlowStepsGrid", vae=["ckpt", 2], step_counts="1, 2, 4, 8", **sampling)
    graph["grid"] = node("SaveImage", images=["draw", 0], filename_prefix=f"{name}_grid")
    graph["measure"] = node("Diff2FlowStraightness", steps=6, **sampling)
    graph["plot"] = node("SaveImage", images=["measure", 2], filename_prefix=f"{name}_plot")
    shown = {"steps": ["tuned", 1], "cfg": ["tuned", 2], "straightness": ["measure", 0], "relative": ["measure", 1]}
    for title, source in {**shown, "report": ["measure", 3]}.items():
        graph[title] = node("PreviewAny", source=source)
    graph["decode"] = node("VAEDecode", samples=["measure", 4], vae=["ckpt", 2])
    graph["walked"] = node("SaveImage", images=["decode", 0], filename_prefix=f"{name}_walked")
    return graph


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_pairs_to_a_grid_of_steps(server: ComfyServer, recipe: str) -> None:
    name = f"whole_{recipe}"
    server.run(reflow(base(CHECKPOINT), RECIPES[recipe], name))
    assert lora_file(server, name).exists()
    shown = server.outputs(looked_at(name))
    texts = {title: out["text"][0] for title, out in shown.items() if out.get("text")}
    assert int(texts["steps"]) == 4 and float(texts["cfg"]) == 1.0
    assert float(texts["straightness"]) > 0.0 and 0.0 < float(texts["relative"]) < 10.0
    assert texts["report"].startswith("straightness ") and "over 6 steps" in texts["report"]
    [grid] = server.files(shown["grid"])
    [plot] = server.files(shown["plot"])
    assert pixels([grid]).shape[1] > 2 * 64 and pixels([grid]).shape[2] > 4 * 64
    assert pixels([plot]).std() > 5
    drawn = pixels(server.files(shown["walked"]))
    assert drawn.shape == (2, 64, 64, 3) and drawn.std() > 5
    assert len(np.unique(pixels([grid]).reshape(-1, 3), axis=0)) > 100
    print(f"{recipe}: {texts['report']}")
