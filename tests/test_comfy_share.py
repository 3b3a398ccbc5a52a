"""Baked checkpoints and exported folders in the real ComfyUI server, over HTTP; needs COMFYUI_DIR."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graphs import Graph, base, diff2flow, ksampler, node, saved, stock_flow
from comfy_server import ComfyServer, comfy_dir, failure_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from share_loras import METADATA, random_lora

from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.hosts.headless.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]

CHECKPOINT, LORA = "random.safetensors", "ink.safetensors"
STRENGTH = 0.2
BOUND = 1.0
"""Mean difference in 1/255 that rounding to fp16 may make."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    path = build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    model, clip, _ = load_checkpoint(path, CHECKPOINT, torch.device("cpu"))
    save_file(random_lora(model, clip), str(folder / "models" / "loras" / LORA), METADATA)
    with running:
        yield running


def loaded(**lora: str) -> Graph:
    """A graph whose node `ckpt` is Diff2Flow's loader with the LoRA."""
    chosen = {"ckpt_name": CHECKPOINT, "lora_name": LORA, "lora_strength": STRENGTH, **lora}
    return {**base(CHECKPOINT), "ckpt": node("Diff2FlowCheckpointLoader", **chosen)}


def baking(graph: Graph, name: str, dtype: str) -> Graph:
    """The graph with a node that bakes, `bake`."""
    parts = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "vae": ["ckpt", 2]}
    return {**graph, "bake": node("Diff2FlowSaveCheckpoint", **parts, name=name, save_dtype=dtype)}


def sampled(graph: Graph, prefix: str) -> Graph:
    """The graph with images of a stock KSampler, of stock nodes on our sigmas, and of Diff2Flow Sampler."""
    graph = stock_flow({**graph, "stock": ksampler(["ckpt", 0])}, ["ckpt", 0], "flow")
    graph["ours"] = diff2flow(["ckpt", 0])
    for name in ("stock", "flow", "ours"):
        graph = saved(graph, name, f"{prefix}_{name}")
    return graph


def pixels(files: list[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file).convert("RGB"), np.float64) for file in files])


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_baked_checkpoint_gives_the_same_images_in_stock_nodes(
    server: ComfyServer, request: pytest.FixtureRequest, dtype: str
) -> None:
    with_lora = server.run(baking(sampled(loaded(), f"lora_{dtype}"), f"flow/{dtype}", dtype))
    baked = server.run(sampled(base(f"flow/{dtype}.safetensors"), f"baked_{dtype}"))
    plain = server.run(sampled(base(CHECKPOINT), f"plain_{dtype}"))
    for name in ("stock", "flow", "ours"):
        wanted = pixels(with_lora[f"lora_{dtype}_{name}"])
        difference = np.abs(pixels(baked[f"baked_{dtype}_{name}"]) - wanted).mean()
        effect = np.abs(pixels(plain[f"plain_{dtype}_{name}"]) - wanted).mean()
        shown = f"{dtype} {name}: baked and LoRA differ by {difference:.3f}, LoRA and base by {effect:.1f} of 255"
        request.node.user_properties.append(("measured", shown))
        print(shown)
        assert difference <= BOUND < effect / 3
    assert "lora key not loaded" not in server.log.read_text(errors="replace")


def test_baked_file_has_the_keys_of_its_base_and_says_what_it_is(server: ComfyServer) -> None:
    graph = baking(loaded(), "keys", "fp16")
    server.outputs(graph)
    folder = server.base / "models" / "checkpoints"
    original, baked = load_file(folder / CHECKPOINT), load_file(folder / "keys.safetensors")
    lacking, added = set(original) - set(baked), set(baked) - set(original)
    assert not lacking and all("position_ids" in key for key in added), (lacking, added)
    assert {key: baked[key].shape for key in original} == {key: value.shape for key, value in original.items()}
    assert all(value.dtype == torch.float16 for value in baked.values() if value.is_floating_point())
    with safe_open(folder / "keys.safetensors", framework="pt") as file:
        said = file.metadata()
    assert said["modelspec.title"] == "keys" and said["diff2flow.start"] == "terminal"
    assert not list(folder.glob(".*"))


def test_baking_in_both_hosts_gives_the_same_file(server: ComfyServer) -> None:
    from diff2flow_nodes import hosts
    from diff2flow_nodes.hosts.headless import HeadlessHost
    from diff2flow_nodes.nodes.sharing import Diff2FlowSaveCheckpoint

    server.outputs(baking(loaded(), "in_comfy", "fp32"))
    models, before = server.base / "models", list(hosts._chosen)
    host = HeadlessHost(models, server.base / "input", server.base / "output")
    hosts.use(host)
    model, clip, vae = host.load_checkpoint(CHECKPOINT)
    model, clip = host.apply_lora(model, clip, load_file(models / "loras" / LORA), STRENGTH, METADATA)
    Diff2FlowSaveCheckpoint().save(model, clip, vae, "in_headless", "fp32")
    hosts._chosen[:] = before
    ours, theirs = (load_file(models / "checkpoints" / f"in_{name}.safetensors") for name in ("headless", "comfy"))
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=2e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


def test_what_cannot_be_baked_is_refused(server: ComfyServer) -> None:
    loras = server.base / "models" / "loras"
    naive = {**METADATA, "diff2flow.objective": "flow_matching"}
    save_file(load_file(loras / LORA), str(loras / "naive.safetensors"), naive)
    for lora, words in (("None", "no Diff2Flow LoRA on it"), ("naive.safetensors", "plain flow matching")):
        failure = failure_of(server.wait(server.queue(baking(loaded(lora_name=lora), "never", "fp16"))))
        assert failure and failure["exception_message"].startswith("Diff2Flow Save Checkpoint: model: ")
        assert words in failure["exception_message"]
    answer = server.post("/prompt", {"prompt": baking(loaded(), "../outside", "fp16")})
    assert "prompt_id" not in answer
    assert not list((server.base / "models" / "checkpoints").glob("never*"))


def test_export_needs_diffusers_or_says_so(server: ComfyServer, request: pytest.FixtureRequest) -> None:
    """ComfyUI brings no diffusers: one sentence, and nothing is left behind. With it, the pipeline gives our images."""
    graph = {**base(CHECKPOINT, "a handwritten three"), "ckpt": loaded()["ckpt"]}
    graph = saved({**graph, "ours": diff2flow(["ckpt", 0])}, "ours", "export_ours")
    parts = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "vae": ["ckpt", 2]}
    graph["export"] = node("Diff2FlowExportDiffusers", **parts, name="flow", save_dtype="fp16")
    entry = server.wait(server.queue(graph))
    failure, folder = failure_of(entry), server.base / "output" / "diffusers" / "flow"
    if failure is not None:
        assert "the Python package diffusers is not installed" in failure["exception_message"]
        assert not folder.exists()
        return
    found = pixels(server.files(entry["outputs"]["export_ours"]))
    difference = np.abs(found - by_diffusers(folder)).mean()
    request.node.user_properties.append(("measured", f"diffusers and ComfyUI differ by {difference:.3f} of 255"))
    print(f"diffusers and ComfyUI differ by {difference:.3f} of 255")
    assert found.std() > 5 and difference <= BOUND


def by_diffusers(folder: Path, steps: int = 4) -> np.ndarray:
    """Pixels of the exported pipeline, from ComfyUI's noise and by the page's sigmas."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    t = torch.linspace(0.0640425, 1.0, steps + 1, dtype=torch.float64)
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(5))
    texts = {"prompt": ["a handwritten three"] * 2, "negative_prompt": ["blurred"] * 2}
    size = {"width": 64, "height": 64, "latents": noise, "output_type": "np"}
    return pipe(**texts, **size, sigmas=((1 - t) / t).tolist(), guidance_scale=3.0).images * 255.0
