"""Diff2Flow Evaluate in the real ComfyUI server, and the same headless; needs COMFYUI_DIR."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graphs import Graph, node
from comfy_server import ComfyServer, comfy_dir, failure_of
from PIL import Image, ImageSequence
from test_comfy_host import record

from diff2flow_nodes import hosts
from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.hosts.headless.host import HeadlessHost
from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS
from diff2flow_nodes.tests.depth_pairs import write_frames, write_image

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]

CHECKPOINT = "random.safetensors"
NUMBERS = NODE_CLASS_MAPPINGS["Diff2FlowEvaluate"].RETURN_NAMES


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    write_frames(folder / "input" / "samples.webp", list(range(8)))
    write_frames(folder / "input" / "reference.webp", list(range(20, 29)))
    write_image(folder / "input" / "single.png", 3)
    (folder / "input" / "pictures").mkdir()
    for number in range(4):
        write_image(folder / "input" / "pictures" / f"{number}.png", number)
        (folder / "input" / "pictures" / f"{number}.txt").write_text(f"scene {number}")
    with running:
        yield running


def evaluation(samples: str = "samples.webp", flow: bool = True, **changes: object) -> Graph:
    """A graph that shows all of the node's outputs: one Preview Any for each, with the output's name."""
    inputs = {"samples": ["samples", 0], "reference": ["reference", 0], "features": "pixels", "seed": 3, **changes}
    graph = {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "samples": node("LoadImage", image=samples),
        "reference": node("LoadImage", image="reference.webp"),
        "dataset": node("Diff2FlowImageDataset", folder="pictures", vae=["ckpt", 2], clip=["ckpt", 1], resolution=64),
    }
    if flow:
        inputs |= {"model": ["ckpt", 0], "dataset": ["dataset", 0]}
    graph["evaluate"] = node("Diff2FlowEvaluate", **inputs)
    return graph | {name: node("PreviewAny", source=["evaluate", i]) for i, name in enumerate(NUMBERS)}


def in_comfy(server: ComfyServer, graph: Graph) -> dict[str, str]:
    """What ComfyUI shows of each output."""
    return {name: shown["text"][0] for name, shown in server.outputs(graph).items() if name in NUMBERS}


def frames(path: Path) -> torch.Tensor:
    """IMAGE (B, H, W, 3) of a file's frames."""
    pictures = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(path))]
    return torch.from_numpy(np.stack(pictures)).float() / 255


def in_headless(server: ComfyServer) -> dict[str, object]:
    """The same numbers, in this process."""
    before, folder = list(hosts._chosen), server.base / "input"
    host = HeadlessHost(server.base / "models", folder, server.base / "headless")
    hosts.use(host)
    try:
        model, clip, vae = host.load_checkpoint(CHECKPOINT)
        dataset = NODE_CLASS_MAPPINGS["Diff2FlowImageDataset"]().build("pictures", vae, clip, 64)[0]
        found = NODE_CLASS_MAPPINGS["Diff2FlowEvaluate"]().evaluate(
            frames(folder / "samples.webp"), frames(folder / "reference.webp"), "pixels", model=model, dataset=dataset,
            seed=3,
        )  # fmt: skip
    finally:
        hosts._chosen[:] = before
    return dict(zip(NUMBERS, found, strict=True))


def test_both_hosts_measure_the_same(server: ComfyServer, request: pytest.FixtureRequest) -> None:
    shown, expected = in_comfy(server, evaluation()), in_headless(server)
    found = {name: float(shown[name]) for name in NUMBERS if name != "report"}
    assert math.isnan(found.pop("clip_score")) and math.isnan(expected.pop("clip_score"))
    record(request, **found)
    assert found["frechet"] > 0 and 0 <= found["precision"] <= 1 and found["flow_matching_loss"] > 0
    for name in ("frechet", "kernel", "precision", "recall"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for name in ("straightness", "flow_matching_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert "8 images against 9 by pixels" in shown["report"] and f"{found['frechet']:.4g}" in shown["report"]


def test_images_alone_are_enough(server: ComfyServer) -> None:
    shown = in_comfy(server, evaluation(flow=False))
    assert shown["straightness"] == shown["flow_matching_loss"] == "nan" and float(shown["frechet"]) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": "single.png"}, ("Diff2Flow Evaluate", "not 1 in samples and 9 in reference")),
        ({"features": "inception"}, ("Diff2Flow Evaluate", "models/metrics")),
        ({"captions": "a scene"}, ("Diff2Flow Evaluate", "captions", "clip_model")),
    ],
)
def test_what_cannot_be_measured_is_said(server: ComfyServer, changes: dict[str, str], words: tuple[str, ...]) -> None:
    failure = failure_of(server.wait(server.queue(evaluation(flow=False, **changes))))
    assert failure is not None and failure["node_type"] == "Diff2FlowEvaluate"
    assert all(word in failure["exception_message"] for word in words), failure["exception_message"]
