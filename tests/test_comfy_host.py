"""The same workflows in the real ComfyUI server, over HTTP, and headless; needs COMFYUI_DIR."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from comfy_graphs import Graph, base, diff2flow, ksampler, node, saved, stock_flow, training
from comfy_server import ComfyServer, comfy_dir, failure_of
from PIL import Image

from diff2flow_nodes.bench.random_prior import build_random

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]

CHECKPOINT = "random.safetensors"
BOUND = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    _write_images(folder / "input" / "digits")
    with running:
        yield running


def _write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i in range(4):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[8 * i : 8 * i + 24, 16:48] = (200, 60 * i, 90)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red bar" if i % 2 else "a pink bar")


def headless(server: ComfyServer, graph: Graph, expect: int = 0) -> tuple[list[Path], str]:
    """Files that the headless runner says it wrote, in ComfyUI's own folders, and its stderr."""
    file = server.base / "graph.json"
    file.write_text(json.dumps(graph))
    output = server.base / "headless"
    folders = ["--models", server.base / "models", "--input", server.base / "input", "--output", output]
    command = [sys.executable, "-m", "diff2flow_nodes", "run", file, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=server.base)
    assert done.returncode == expect, done.stderr[-3000:]
    return [server.base / line for line in done.stdout.splitlines()], done.stderr


def pixels(files: list[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file).convert("RGB"), np.float64) for file in files])


def in_comfy(server: ComfyServer, graph: Graph, prefix: str) -> np.ndarray:
    return pixels(server.run(graph)[prefix])


def in_headless(server: ComfyServer, graph: Graph, prefix: str) -> np.ndarray:
    files, _ = headless(server, graph)
    return pixels([f for f in files if f.name.startswith(f"{prefix}_")])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in 1/255; the images must not be flat."""
    assert a.shape == b.shape and a.std() > 5
    return float(np.abs(a - b).mean())


def record(request: pytest.FixtureRequest, **numbers: float) -> None:
    """Numbers for the report, shown with -rA or in the terminal summary."""
    shown = ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
    request.node.user_properties.append(("measured", shown))
    print(shown)


def test_pack_loads(server: ComfyServer) -> None:
    info = server.get("/object_info")
    from diff2flow_nodes import NODE_CLASS_MAPPINGS

    assert set(NODE_CLASS_MAPPINGS) <= set(info)
    assert "IMPORT FAILED" not in server.tail(20000)


@pytest.mark.parametrize("sampler", ["ksampler", "diff2flow", "heun", "image_to_image"])
def test_same_image_in_both_hosts(server: ComfyServer, request: pytest.FixtureRequest, sampler: str) -> None:
    graph = base(CHECKPOINT)
    graph["image"] = node("LoadImage", image="digits/1.png")
    graph["encoded"] = node("VAEEncode", pixels=["image", 0], vae=["ckpt", 2])
    graph["sample"] = {
        "ksampler": ksampler(["ckpt", 0]),
        "diff2flow": diff2flow(["ckpt", 0]),
        "heun": diff2flow(["ckpt", 0], solver="heun", start="noise"),
        "image_to_image": diff2flow(["ckpt", 0], latent="encoded", denoise=0.5),
    }[sampler]
    graph = saved(graph, "sample", f"same_{sampler}")
    found = distance(in_comfy(server, graph, f"same_{sampler}"), in_headless(server, graph, f"same_{sampler}"))
    record(request, pixel_difference=found)
    assert found <= BOUND


def test_stock_nodes_give_the_same_image(server: ComfyServer, request: pytest.FixtureRequest) -> None:
    """Diff2FlowSampler, SamplerCustom on a stock model, and KSampler on Diff2FlowModel."""
    graph = base(CHECKPOINT)
    graph["ours"] = diff2flow(["ckpt", 0], steps=8)
    graph = stock_flow(graph, ["ckpt", 0], "stock", steps=8)
    patch = {"prediction": "auto", "zero_terminal_snr": "auto", "start": "auto", "shift": 1.0}
    graph["patched"] = node("Diff2FlowModel", model=["ckpt", 0], **patch)
    graph["ksampler"] = ksampler(["patched", 0], steps=8, cfg=3.0, scheduler="simple")
    for name in ("ours", "stock", "ksampler"):
        graph = saved(graph, name, f"euler_{name}")
    files = server.run(graph)
    images = {name: pixels(files[f"euler_{name}"]) for name in ("ours", "stock", "ksampler")}
    stock, patched = (distance(images[name], images["ours"]) for name in ("stock", "ksampler"))
    record(request, stock_sampler_custom=stock, ksampler_on_patched=patched)
    assert stock <= BOUND and patched <= BOUND


@pytest.mark.parametrize("trained_in", ["comfy", "headless"])
def test_lora_crosses_hosts(server: ComfyServer, request: pytest.FixtureRequest, trained_in: str) -> None:
    """A LoRA from one host gives the same images in the other, through our loader and through the stock one."""
    name = f"from_{trained_in}"
    train = training(base(CHECKPOINT), "digits", name)
    train["tuned_sample"] = diff2flow(["train", 0])
    train["base_sample"] = diff2flow(["ckpt", 0])
    train = saved(saved(train, "tuned_sample", f"{name}_tuned"), "base_sample", f"{name}_base")
    run = in_comfy if trained_in == "comfy" else in_headless
    tuned = run(server, train, f"{name}_tuned")
    load = base(CHECKPOINT)
    load["ours"] = node("Diff2FlowLoraLoader", model=["ckpt", 0], lora_name=f"{name}.safetensors", strength=1.0)
    stock = {"lora_name": f"{name}.safetensors", "strength_model": 1.0}
    load["stock"] = node("LoraLoader", model=["ckpt", 0], clip=["ckpt", 1], strength_clip=1.0, **stock)
    load["off"] = node("Diff2FlowLoraLoader", model=["ckpt", 0], lora_name=f"{name}.safetensors", strength=0.0)
    load["base"] = diff2flow(["ckpt", 0])
    for loader in ("ours", "stock", "off"):
        load[f"{loader}_sample"] = diff2flow([loader, 0])
        load = saved(load, f"{loader}_sample", f"{name}_{loader}")
    load = saved(load, "base", f"{name}_plain")
    shown = {}
    files = server.run(load)
    elsewhere, _ = headless(server, load)
    for loader in ("ours", "stock"):
        shown[f"{loader}_comfy"] = distance(pixels(files[f"{name}_{loader}"]), tuned)
        mine = pixels([f for f in elsewhere if f.name.startswith(f"{name}_{loader}_")])
        shown[f"{loader}_headless"] = distance(mine, tuned)
    plain = pixels(files[f"{name}_plain"])
    shown["effect"] = float(np.abs(plain - tuned).mean())
    record(request, **shown)
    assert np.array_equal(pixels(files[f"{name}_off"]), plain)
    assert all(value <= BOUND for key, value in shown.items() if key != "effect") and shown["effect"] > BOUND
    assert "lora key not loaded" not in server.log.read_text(errors="replace")


def test_interrupt_saves_and_leaves_nothing_patched(server: ComfyServer) -> None:
    """Interrupt by the API in mid-run: the LoRA is on disk, the queue goes on, a stock KSampler gives what it gave."""
    plain = base(CHECKPOINT)
    plain["sample"] = ksampler(["ckpt", 0], seed=77)
    plain = saved(plain, "sample", "plain")
    before = in_comfy(server, plain, "plain")
    queued = server.queue(training(base(CHECKPOINT), "digits", "interrupted", steps=100000))
    _wait_for_step(server)
    server.post("/interrupt", {})
    entry = server.wait(queued)
    assert failure_of(entry)["kind"] == "execution_interrupted"
    lora = server.base / "models" / "loras" / "interrupted.safetensors"
    assert lora.exists()
    assert not list(lora.parent.glob("*.part")) and not list(lora.parent.glob(".*.part"))
    plain["sample"]["inputs"]["seed"] = 77
    plain["latent"]["inputs"]["batch_size"] = 2
    plain["negative"]["inputs"]["text"] = "blurred "  # not from the cache
    plain["plain"]["inputs"]["filename_prefix"] = "plain_again"
    assert (
        np.array_equal(in_comfy(server, plain, "plain"), before)
        or distance(in_comfy(server, plain, "plain"), before) == 0
    )


def _wait_for_step(server: ComfyServer) -> None:
    """Until the training has shown a step in the log or a few seconds have passed since the queue took it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if "Training interrupted" in server.tail(2000):
            break
        if server.get("/prompt")["exec_info"]["queue_remaining"]:
            time.sleep(8)
            return
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"ckpt_name": "truncated.safetensors"}, ("truncated.safetensors", "cannot be loaded")),
        ({"ckpt_name": "other.safetensors"}, ("other.safetensors",)),
        ({"lora_name": "not_a_lora.safetensors"}, ("not_a_lora.safetensors",)),
    ],
)
def test_bad_files_are_named(server: ComfyServer, inputs: dict[str, str], words: tuple[str, ...]) -> None:
    _write_bad_files(server.base / "models")
    graph = {
        "load": node(
            "Diff2FlowCheckpointLoader",
            **{"ckpt_name": CHECKPOINT, "lora_name": "None", "lora_strength": 1.0, **inputs},
        ),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "decode": node("VAEDecode", samples=["latent", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="never"),
    }
    failure = failure_of(server.wait(server.queue(graph)))
    assert failure and failure["node_type"] == "Diff2FlowCheckpointLoader"
    assert failure["exception_message"].startswith("Diff2Flow Checkpoint Loader: ")
    assert all(word in failure["exception_message"] for word in words)


def _write_bad_files(models: Path) -> None:
    import torch
    from safetensors.torch import save_file

    checkpoints = models / "checkpoints"
    whole = (checkpoints / CHECKPOINT).open("rb").read(1 << 20)
    (checkpoints / "truncated.safetensors").write_bytes(whole)
    save_file({"some.weight": torch.zeros(3)}, str(checkpoints / "other.safetensors"))
    save_file({"some.weight": torch.zeros(3)}, str(models / "loras" / "not_a_lora.safetensors"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": {"folder": "../outside"}}, ("..",)),
        ({"dataset": {"folder": "no_such_folder"}}, ("no_such_folder",)),
        ({"train": {"output_name": "../outside"}}, ("..",)),
        ({"train": {"steps": 0}}, ("steps",)),
    ],
)
def test_bad_values_are_refused_before_anything_runs(
    server: ComfyServer, changes: dict[str, dict[str, object]], words: tuple[str, ...]
) -> None:
    graph = training(base(CHECKPOINT), "digits", "never")
    for name, inputs in changes.items():
        graph[name]["inputs"].update(inputs)
    answer = server.post("/prompt", {"prompt": graph})
    assert "prompt_id" not in answer
    assert all(word in json.dumps(answer) for word in words)
    assert not list((server.base / "models" / "loras").glob("never*"))
