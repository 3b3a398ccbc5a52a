"""Training in the real ComfyUI server: interrupted, resumed, watched, and what it leaves behind; needs COMFYUI_DIR."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_events import Events
from comfy_graphs import Graph, base, ksampler, node, saved, training
from comfy_server import ComfyServer, comfy_dir, failure_of
from PIL import Image

from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.files import sha256_of
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.state import states_in

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]

CHECKPOINT = "random.safetensors"
STEPS = 8
MEMORY_SHARE = 0.02
TRIM = """
import ctypes, gc

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class TrimMemory:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "trim", True, "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0, "max": 10**9})}}

    def trim(self, number):
        gc.collect()
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        libc.mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in NAMES]})
        info = libc.mallinfo2()
        return {"ui": {"held": [(info.uordblks + info.hblkhd) / 2**20]}}

NODE_CLASS_MAPPINGS = {"TrimMemory": TrimMemory}
"""
"""A custom node of the tests: gives memory that nobody holds back to the system, and tells how much is held."""
_salt = count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    (folder / "custom_nodes" / "trim_memory.py").write_text(TRIM)
    build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    pictures = folder / "input" / "digits"
    pictures.mkdir(parents=True)
    for i in range(4):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[8 * i : 8 * i + 24, 16:48] = (200, 60 * i, 90)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"bar {i}")
    with running:
        yield running


@pytest.fixture(scope="module")
def before(server: ComfyServer) -> np.ndarray:
    """What a stock KSampler draws before anything was trained."""
    return stock(server)


def stock(server: ComfyServer) -> np.ndarray:
    """An image of stock nodes alone, encoded and sampled anew each time (a longer prompt of the same tokens)."""
    graph = base(CHECKPOINT, prompt="a handwritten (three:1.2)" + " " * next(_salt), batch=1)
    graph["sample"] = ksampler(["ckpt", 0], steps=4)
    [file] = server.run(saved(graph, "sample", "stock"))["stock"]
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert pixels.std() > 5
    return pixels


def graph_of(name: str, lora: dict[str, Any] | None = None, **changes: Any) -> Graph:
    graph = training(base(CHECKPOINT), "digits", name, **{"steps": STEPS, "batch_size": 2, **changes})
    graph["ckpt"] = node("Diff2FlowCheckpointLoader", ckpt_name=CHECKPOINT, lora_name="None", lora_strength=1.0)
    graph["lora"]["inputs"].update(lora or {})
    if (lora or {}).get("text_encoder"):
        graph["train"]["inputs"]["clip"] = ["ckpt", 1]
    return graph


def run_folder(server: ComfyServer, name: str) -> Path:
    return server.base / "output" / "diff2flow" / name


def entries(server: ComfyServer, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder(server, name) / "log.jsonl").read_text().splitlines()]


def lora_of(server: ComfyServer, name: str) -> dict[str, torch.Tensor]:
    return load_lora(server.base / "models" / "loras" / f"{name}.safetensors")[0]


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_interrupted_and_queued_again_is_the_run_that_never_stopped(server: ComfyServer, before: np.ndarray) -> None:
    server.run(graph_of("whole"))
    with Events(server.port) as events:
        queued = server.queue(graph_of("stopped"), events.client_id)
        events.wait_for("diff2flow.train", lambda data: data["kind"] == "step" and data["step"] >= 2)
        server.post("/interrupt", {})
        assert failure_of(server.wait(queued))["kind"] == "execution_interrupted"
    [state] = states_in(run_folder(server, "stopped") / "states")
    step = int(state.stem.removeprefix("state_"))
    assert 2 <= step < STEPS and lora_of(server, "stopped")
    assert np.array_equal(stock(server), before)
    server.run(graph_of("stopped"))
    assert [entry["step"] for entry in entries(server, "stopped") if entry["kind"] == "begin"] == [0, step]
    steps = [entry["step"] for entry in entries(server, "stopped") if entry["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert equal(lora_of(server, "stopped"), lora_of(server, "whole"))
    assert not list((server.base / "models" / "loras").glob("stopped_*")) and not list(server.base.rglob("*.part"))
    assert np.array_equal(stock(server), before)


def test_watched_training_says_and_leaves_what_it_should(server: ComfyServer, before: np.ndarray) -> None:
    graph = graph_of("watched", steps=4)
    graph["watch"] = node(
        "Diff2FlowTrainWatch", vae=["ckpt", 2], clip=["ckpt", 1], prompts="bar 1\nbar 2", sample_every=2,
        sample_steps="2", cfg=3.0, width=64, height=64, seed=3, validate_every=2, held_out_share=0.25,
    )  # fmt: skip
    graph["train"]["inputs"]["watch"] = ["watch", 0]
    with Events(server.port) as events:
        server.run(graph, events.client_id)
        events.wait_for("diff2flow.train", lambda data: data["kind"] == "saved")
        heard = events.of("diff2flow.train")
    assert {data["kind"] for data in heard if data["node"] != "train"} <= {"status"}  # of the dataset, where it encodes
    kinds = [data["kind"] for data in heard if data["node"] == "train"]
    assert kinds[:2] == ["status", "begin"]  # first what is trained, in words
    assert kinds[: kinds.index("saved") + 1][-3:] == ["end", "phase", "saved"]  # the LoRA, before the state
    assert set(kinds) >= {"step", "validation", "samples"} and kinds.count("samples") == 2
    logged = entries(server, "watched")
    assert [entry["step"] for entry in logged if entry["kind"] == "step"] == [1, 2, 3, 4]
    assert [entry["step"] for entry in logged if entry["kind"] == "validation"] == [2, 4]
    files = [name for entry in logged if entry["kind"] == "samples" for name in entry["files"]]
    pictures = [np.asarray(Image.open(run_folder(server, "watched") / "samples" / name)) for name in files]
    assert len(pictures) == 2 and all(picture.std() > 5 for picture in pictures)
    assert np.array_equal(stock(server), before)


def test_training_the_text_encoder_leaves_clip_as_it_was(server: ComfyServer, before: np.ndarray) -> None:
    server.run(graph_of("text", {"text_encoder": True}, steps=2))
    assert any(key.startswith("lora_te_") for key in lora_of(server, "text"))
    assert np.array_equal(stock(server), before)


def test_an_empty_clip_that_is_taken_ends_before_training(server: ComfyServer) -> None:
    graph = graph_of("no_clip", steps=2)
    graph["positive"] = node("CLIPTextEncode", text="a", clip=["train", 3])
    graph["sample"] = ksampler(["train", 0], steps=1)
    failure = failure_of(server.wait(server.queue(saved(graph, "sample", "no_clip"))))
    assert failure is not None and failure["node_id"] == "train"
    assert "clip: nothing is connected" in failure["exception_message"]
    assert "CLIPTextEncode (node positive, clip)" in failure["exception_message"]
    assert not (server.base / "models" / "loras" / "no_clip.safetensors").exists()


def test_the_base_behind_a_stock_loader_is_named_or_nothing_is(server: ComfyServer) -> None:
    """Newer versions tell the file, older ones do not."""
    graph = graph_of("stock_base", steps=2)
    graph["ckpt"] = node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    server.run(graph)
    metadata = load_lora(server.base / "models" / "loras" / "stock_base.safetensors")[1]
    found = {key: metadata[key] for key in metadata if "base_name" in key or "sd_model" in key or "base_hash" in key}
    digest = sha256_of(server.base / "models" / "checkpoints" / CHECKPOINT)
    named = {"ss_sd_model_name": CHECKPOINT, "ss_new_sd_model_hash": digest, "ss_sd_model_hash": digest[:10],
             "diff2flow.base_name": CHECKPOINT, "diff2flow.base_hash": digest}  # fmt: skip
    tells = "cached_patcher_init" in (comfy_dir() / "comfy" / "model_patcher.py").read_text()
    assert found == (named if tells else {})


def test_training_again_and_again_leaks_nothing(server: ComfyServer, before: np.ndarray) -> None:
    """Four kinds of training, twice: once models are unloaded, the heap holds what it held after the first of all.

    The resident memory is compared round with round: of freed blocks, those that share a page with others stay in it.
    """
    kinds = {
        "light": {},
        "small": {"preset": "paper-small"},
        "text": {"text_encoder": True},
        "full": {"preset": "full"},
    }
    held, resident = [], []
    for turn in range(2):
        for name, lora in kinds.items():
            server.run(graph_of(f"leak_{name}", lora, steps=2, seed=10 + turn))
            held.append(settled(server))
            resident.append(server.memory())
    shown = [[round(size, 1) for size in sizes] for sizes in (held, resident)]
    print(f"MB held and resident after {', '.join(kinds)}, and again:", *shown)
    assert max(held) <= (1 + MEMORY_SHARE) * held[0], shown
    assert max(resident[len(kinds) :]) <= (1 + MEMORY_SHARE) * max(resident[: len(kinds)]), shown
    assert np.array_equal(stock(server), before)


def settled(server: ComfyServer) -> float:
    """MB that the heap holds once models are unloaded and caches are empty; free memory is given back."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.0)
    entry = server.wait(server.queue({"trim": node("TrimMemory", number=next(_salt))}))
    return entry["outputs"]["trim"]["held"][0]


def test_a_client_is_told_what_was_written_and_an_unchanged_graph_writes_it_again(server: ComfyServer) -> None:
    """The history names the file, its steps and its loss; whose file is gone does not succeed from memory."""
    graph = graph_of("told", steps=2)
    file = server.base / "models" / "loras" / "told.safetensors"
    first = server.outputs(graph)["train"]
    losses = [entry["loss"] for entry in entries(server, "told") if entry["kind"] == "step"]
    assert first["file"] == ["told.safetensors"] and first["steps"] == [2] and first["notes"] == []
    assert first["last_loss"] == pytest.approx(losses[-1:]) and first["mean_loss"] == pytest.approx([np.mean(losses)])
    written = file.stat().st_mtime_ns
    assert server.outputs(graph)["train"] == first and file.stat().st_mtime_ns == written, "taken from memory"
    weights = lora_of(server, "told")
    file.unlink()
    assert server.outputs(graph)["train"] == first and equal(lora_of(server, "told"), weights)
    written = file.stat().st_mtime_ns
    assert server.outputs(graph)["train"] == first and file.stat().st_mtime_ns == written, "from memory again"
