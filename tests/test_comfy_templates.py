"""The templates in the real ComfyUI: its list of them, its own view of their nodes, and every one run."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from comfy_server import ComfyServer, comfy_dir
from PIL import Image

from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.bench.templates import FOLDER, api_graph
from diff2flow_nodes.bench.templates.declared import declared
from diff2flow_nodes.bench.templates.words import TEMPLATES
from diff2flow_nodes.tests.tiny_templates import CHECKPOINT, LORAS, NEEDS, PICTURES, tiny, write_inputs

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]
USED = sorted({entry["class_type"] for name in TEMPLATES for entry in api_graph(name).values()})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    write_inputs(folder / "input")
    with running:
        yield running


@pytest.fixture(scope="module")
def run(server: ComfyServer) -> Callable[[str], None]:
    """Runs a template once, after the one that makes its LoRA."""
    done: set[str] = set()

    def once(name: str) -> None:
        if name in NEEDS:
            once(NEEDS[name])
        if name not in done:
            server.run(tiny(name))
            done.add(name)

    return once


def test_the_browser_lists_them_with_their_pages_and_thumbnails(server: ComfyServer) -> None:
    assert sorted(server.get("/workflow_templates")["diff2flow_nodes"]) == sorted(TEMPLATES)
    for name in TEMPLATES:
        for ending in ("json", "jpg"):
            address = f"http://127.0.0.1:{server.port}/api/workflow_templates/diff2flow_nodes/{name}.{ending}"
            with urllib.request.urlopen(address, timeout=30) as answer:
                assert answer.read() == (FOLDER / f"{name}.{ending}").read_bytes()


@pytest.mark.parametrize("class_type", USED)
def test_comfyui_declares_what_the_writer_knows(server: ComfyServer, class_type: str) -> None:
    """Names, order and types of inputs and outputs, and which widgets have others behind them."""
    found = server.get(f"/object_info/{class_type}")[class_type]
    there = [(name, *_typed(entry)) for group in ("required", "optional") for name, entry in _inputs(found, group)]
    known = declared(class_type)
    assert [(name, kind) for name, kind, _ in there] == [(entry.name, entry.type) for entry in known.inputs]
    for entry, (_, kind, options) in zip(known.inputs, there, strict=True):
        seeded = options.get("control_after_generate", entry.name in ("seed", "noise_seed") and kind == "INT")
        assert bool(entry.followers) == bool(seeded or options.get("image_upload")), entry.name
        assert entry.optional == (entry.name in found["input"].get("optional", {}))
    outputs = list(zip(found["output_name"], found["output"], strict=True))
    assert outputs[: len(known.outputs)] == list(known.outputs)


def _inputs(found: dict[str, Any], group: str) -> list[tuple[str, Any]]:
    return [(name, found["input"][group][name]) for name in found["input_order"].get(group, ())]


def _typed(entry: list[Any]) -> tuple[str, dict[str, Any]]:
    return (entry[0] if isinstance(entry[0], str) else "COMBO"), (entry[1] if len(entry) > 1 else {})


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_runs(server: ComfyServer, run: Callable[[str], None], name: str) -> None:
    run(name)
    for beginning in PICTURES[name]:
        [picture] = (server.base / "output").glob(f"{beginning}_0*.png")
        assert min(Image.open(picture).size) >= 56
    if name in LORAS:
        assert (server.base / "models" / "loras" / f"{LORAS[name]}.safetensors").exists()
