"""Reflow in the real ComfyUI server, from the pairs to the images of few steps; needs COMFYUI_DIR."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_graphs import Graph, base, diff2flow, ksampler, node, reflow, saved, stock_flow
from comfy_server import ComfyServer, comfy_dir
from test_comfy_host import pixels, record

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
LOUD = {"steps": 30, "batch_size": 4, "learning_rate": 0.003}
"""Of a training that can be seen."""
STOCK = ("LoraLoader", "LoraLoaderModelOnly")
OTHERS = (*STOCK, "patched")


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


def four_steps(name: str, cfg: float, start: str) -> Graph:
    """4 Euler steps from one seed: `ours`, each of STOCK, `patched`, and `base` without the LoRA.

    `patched` is the stock LoraLoader and KSampler with Diff2Flow Model between, told where ours starts.
    """
    graph = loaded(name)
    stock = {"model": ["ckpt", 0], "lora_name": f"{name}.safetensors", "strength_model": 1.0}
    graph["LoraLoader_model"] = node("LoraLoader", clip=["ckpt", 1], strength_clip=1.0, **stock)
    graph["LoraLoaderModelOnly_model"] = node("LoraLoaderModelOnly", **stock)
    graph["ours_sample"] = diff2flow(["tuned", 0], steps=4, cfg=cfg)
    graph["base_sample"] = diff2flow(["ckpt", 0], steps=4, cfg=cfg)
    for loader in STOCK:
        graph = stock_flow(graph, [f"{loader}_model", 0], f"{loader}_sample", steps=4, cfg=cfg)
    flow = {"prediction": "auto", "zero_terminal_snr": "auto", "start": start, "shift": 1.0}
    graph["flow"] = node("Diff2FlowModel", model=["LoraLoader_model", 0], **flow)
    graph["patched_sample"] = ksampler(["flow", 0], steps=4, cfg=cfg, scheduler="simple")
    for title in ("ours", "base", *OTHERS):
        graph = saved(graph, f"{title}_sample", title)
    return graph


def compared(
    server: ComfyServer, request: pytest.FixtureRequest, name: str, cfg: float, start: str = "terminal"
) -> dict[str, float]:
    """Differences in 1/255 between our sampler with the LoRA and the stock chains, and without it (effect)."""
    files = server.run(four_steps(name, cfg, start))
    images = {title: pixels(files[title]) for title in ("ours", "base", *OTHERS)}
    assert all(image.shape == (2, 64, 64, 3) and image.std() > 5 for image in images.values())
    apart = {title: np.abs(images[title] - images["ours"]) for title in ("base", *OTHERS)}
    found = {"effect": float(apart["base"].mean()), "between_black_and_white": _grey(images["ours"])}
    for title in OTHERS:
        found |= {f"{title}_max": float(apart[title].max()), f"{title}_mean": float(apart[title].mean())}
    record(request, **found)
    return found


def _grey(image: np.ndarray) -> float:
    """Share of the values that are not at an end of the scale, where differences would not show."""
    return float(((image > 0) & (image < 255)).mean())


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_fast_lora_gives_the_same_4_steps_through_stock_nodes(
    server: ComfyServer, request: pytest.FixtureRequest, cfg: float
) -> None:
    """Stock models round the timestep to an integer, that is all the difference: 0.01/255 on average, at most 1/255."""
    if not lora_file(server, "loud_fast").exists():
        server.run(reflow(base(CHECKPOINT), RECIPES["fast"], "loud_fast", **LOUD))
    found = compared(server, request, "loud_fast", cfg)
    assert found["effect"] > 5.0 and found["between_black_and_white"] > 0.5
    assert all(found[f"{title}_max"] <= 1.0 for title in OTHERS)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_paper_lora_through_stock_nodes_starts_elsewhere(
    server: ComfyServer, request: pytest.FixtureRequest, cfg: float
) -> None:
    """Not the same images: ours starts at pure noise, as was trained, a stock model no earlier than t_min.

    On these random weights that is 5/255 on average at CFG 1 and 3/255 at CFG 2, and up to 45/255. Diff2Flow Model
    with start noise makes the stock KSampler start where ours does; without it a LoRA of recipe fast is the one for
    stock nodes.
    """
    if not lora_file(server, "loud_paper").exists():
        server.run(reflow(base(CHECKPOINT), RECIPES["paper"], "loud_paper", **LOUD))
    found = compared(server, request, "loud_paper", cfg, "noise")
    assert found["effect"] > 5.0 and found["patched_max"] <= 1.0
