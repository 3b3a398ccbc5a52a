"""Depth in the real ComfyUI server, from the training to the files, and the same headless; needs COMFYUI_DIR."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_events import Events
from comfy_graphs import Graph, base, diff2flow, ksampler, node, saved
from comfy_server import PACK, ComfyServer, comfy_dir, failure_of
from test_comfy_host import headless, pixels, record

from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.depth.files import read_depth
from diff2flow_nodes.tests.depth_pairs import write_bad_pairs, write_frames, write_image, write_pairs

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
]

CHECKPOINT = "random.safetensors"
LORA, ENDS = "depth_lora", "ends_lora"
FIRST = "lora_unet_conv_in"
_salt = count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    pairs = write_pairs(folder / "input" / "pairs")
    write_bad_pairs(folder / "input" / "bad")
    write_image(folder / "input" / "scene.png", 11)
    write_image(folder / "input" / "odd.png", 12, (80, 72))
    write_frames(folder / "input" / "frames.webp", [3, 5, 3])
    (folder / "input" / "pictures").mkdir()
    for file in list((pairs / "images").iterdir())[:2]:
        (folder / "input" / "pictures" / file.name).write_bytes(file.read_bytes())
        (folder / "input" / "pictures" / f"{file.stem}.txt").write_text("a disc")
    with running:
        yield running


def template(name: str, **changes: dict[str, Any]) -> Graph:
    """A template's graph with inputs changed: title of the node, with _ for spaces -> its inputs."""
    graph = json.loads((PACK / "example_workflows" / "api" / f"{name}.json").read_text())
    titled = {entry["_meta"]["title"].lower().replace(" ", "_"): entry["inputs"] for entry in graph.values()}
    titled["checkpoint"]["ckpt_name"] = CHECKPOINT
    for title, inputs in changes.items():
        titled[title].update(inputs)
    return graph


def depth_training(name: str, folder: str = "pairs", **changes: Any) -> Graph:
    """The training template, small, and loud enough that what it learned shows."""
    train = {"output_name": name, "steps": 6, "batch_size": 4, "learning_rate": 0.003, **changes}
    return template(
        "depth_training",
        images_and_depth={"folder": folder, "resolution": 64},
        what_is_trained={"preset": "custom", "conv": True, "ends_in_full": True},
        how_it_learns={"schedule": "cosine", "ema": 0.98, "checkpointing": False},
        train=train,
    )


def estimation(prefix: str, image: str = "scene.png", lora: str = LORA, **changes: Any) -> Graph:
    """The estimation template; raw depth is written as `prefix`_00001.exr and so on."""
    return template(
        "depth_estimation",
        depth_lora={"lora_name": f"{lora}.safetensors"},
        image={"image": image},
        depth={"ensemble": 1, "steps": 4, **changes},
        save_depth_picture={"filename_prefix": f"{prefix}_picture"},
        save_raw_depth={"filename_prefix": prefix},
    )


def raw(folder: Path, prefix: str) -> np.ndarray:
    """(B, H, W) of the EXR files of a prefix."""
    files = sorted(folder.glob(f"{prefix}_0*.exr"))
    assert files, f"no {prefix}_*.exr in {folder}"
    return np.stack([read_depth(file).numpy() for file in files])


def in_comfy(server: ComfyServer, graph: Graph, prefix: str) -> np.ndarray:
    server.run(graph)
    return raw(server.base / "output", prefix)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference relative to the range of depth, which must not be flat."""
    assert a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all() and np.ptp(b) > 0.05
    assert ((b > 0.01) & (b < 0.99)).mean() > 0.5, "cut off at the ends of the scale, where differences do not show"
    return float(np.abs(a - b).max() / np.ptp(b))


def lora_file(server: ComfyServer, name: str) -> Path:
    return server.base / "models" / "loras" / f"{name}.safetensors"


@pytest.fixture(scope="module")
def lora(server: ComfyServer) -> str:
    """A depth LoRA, by the training template."""
    server.run(depth_training(LORA))
    return LORA


@pytest.fixture(scope="module")
def ends(server: ComfyServer) -> str:
    """A LoRA for images with first and last layer in full: `.diff` of the checkpoint's own shape."""
    graph = base(CHECKPOINT)
    graph["dataset"] = node(
        "Diff2FlowImageDataset", folder="pictures", vae=["ckpt", 2], clip=["ckpt", 1], resolution=64
    )
    graph["lora"] = node("Diff2FlowLoraConfig", preset="custom", rank=4, alpha=4.0, ends_in_full=True)
    graph["train"] = node(
        "Diff2FlowTrain", model=["ckpt", 0], dataset=["dataset", 0], lora=["lora", 0], objective="diff2flow", steps=3,
        batch_size=2, learning_rate=0.003, seed=0, output_name=ENDS,
    )  # fmt: skip
    server.run(graph)
    return ENDS


def text_to_image(server: ComfyServer, model: Graph, prefix: str) -> np.ndarray:
    """Images of `diff2flow` on the node `model`, sampled anew each time (a longer prompt of the same tokens)."""
    graph = {**base(CHECKPOINT, prompt="a handwritten (three:1.2)" + " " * next(_salt)), **model}
    graph["sample"] = diff2flow(["model", 0] if model else ["ckpt", 0])
    return pixels(server.run(saved(graph, "sample", prefix))[prefix])


def with_lora(name: str) -> Graph:
    return {"model": node("Diff2FlowLoraLoader", model=["ckpt", 0], lora_name=f"{name}.safetensors", strength=1.0)}


def test_the_training_template_writes_a_lora_that_widens(server: ComfyServer, lora: str) -> None:
    from safetensors import safe_open

    with safe_open(lora_file(server, lora), "pt") as file:
        metadata = file.metadata()
        shape = tuple(file.get_tensor(f"{FIRST}.reshape_weight").tolist())
        change = file.get_tensor(f"{FIRST}.lora_up.weight").float()
    assert shape[1:] == (8, 3, 3) and change.abs().max() > 0
    assert metadata["diff2flow.task"] == "depth" and metadata["modelspec.resolution"] == "64x64"
    assert (metadata["diff2flow.recommended_steps"], metadata["diff2flow.recommended_cfg"]) == ("10", "1")


def test_the_estimation_template_gives_a_picture_and_an_exr(server: ComfyServer, lora: str) -> None:
    graph = estimation("template", ensemble=4)
    graph["4"]["inputs"]["steps"] = ["2", 1]
    found = {title: files for title, files in server.run(graph).items() if files}
    [[picture]] = found.values()
    depth = raw(server.base / "output", "template")
    shown = pixels([picture])
    assert depth.shape == (1, 64, 64) and np.ptp(depth) > 0.05 and abs(depth.mean() - 0.5) < 0.5
    assert shown.shape == (1, 64, 64, 3) and np.ptp(shown) > 100
    near, far = (shown[0, ..., 0][places(depth[0])].mean() for places in (_lowest, _highest))
    assert near > far  # near_white


def _lowest(depth: np.ndarray) -> np.ndarray:
    return depth <= np.quantile(depth, 0.1)


def _highest(depth: np.ndarray) -> np.ndarray:
    return depth >= np.quantile(depth, 0.9)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd_64": {"image": "odd.png", "resolution": 64},
    "odd_72": {"image": "odd.png", "resolution": 72},
    "odd_auto": {"image": "odd.png"},
    "frames_fixed": {"image": "frames.webp", "noise": "fixed", "batch_size": 2},
    "frames_fresh": {"image": "frames.webp", "noise": "fresh"},
    "ensemble": {"ensemble": 2, "solver": "heun"},
    "ensemble_of_frames": {"image": "frames.webp", "noise": "fresh", "ensemble": 2, "batch_size": 2},
}
STOCK = ("LoraLoader", "LoraLoaderModelOnly")
SHAPES = {"scene.png": (1, 64, 64), "odd.png": (1, 80, 72), "frames.webp": (3, 64, 64)}


def all_cases() -> Graph:
    """The estimation template with every case's own nodes behind one checkpoint and one LoRA.

    And through the stock LoRA loaders. 0.3.64's hand on no metadata: start and resolution are given for them.
    """
    graph: Graph = {}
    for case, changes in CASES.items():
        graph |= _apart(estimation(case, **changes), case)
    told = {"start": "noise", "resolution": 64}
    graph |= _apart(estimation("told", **told), "told")
    for loader in STOCK:
        clip = {"clip": ["1", 1], "strength_clip": 1.0} if loader == "LoraLoader" else {}
        graph[loader] = node(loader, model=["1", 0], lora_name=f"{LORA}.safetensors", strength_model=1.0, **clip)
        stock = _apart(estimation(loader, **told), f"stock_{loader}")
        stock[f"stock_{loader} 4"]["inputs"]["model"] = [loader, 0]
        graph |= stock
    for case in ("ensemble", "ensemble_of_frames"):
        graph[f"{case} spread"] = node(
            "Diff2FlowSaveDepth", depth=[f"{case} 4", 2], filename_prefix=f"spread_{case}", format="exr"
        )
    return graph


def _apart(graph: Graph, name: str) -> Graph:
    """The graph with names of its own for all nodes but the checkpoint (1) and the LoRA (2)."""
    text = json.dumps(graph)
    for number in ("3", "4", "5", "6"):
        text = text.replace(f'"{number}": {{', f'"{name} {number}": {{').replace(
            f'["{number}", ', f'["{name} {number}", '
        )
    return json.loads(text)


@pytest.fixture(scope="module")
def everywhere(server: ComfyServer, lora: str) -> tuple[Path, Path]:
    """Folders with the files of all cases, from ComfyUI and headless."""
    graph = all_cases()
    server.run(graph)
    headless(server, graph)
    return server.base / "output", server.base / "headless"


@pytest.mark.parametrize("case", CASES)
def test_same_depth_in_both_hosts(everywhere: tuple[Path, Path], request: pytest.FixtureRequest, case: str) -> None:
    here, elsewhere = (raw(folder, case) for folder in everywhere)
    found = apart(here, elsewhere)
    record(request, **{f"{case} relative difference in 1e-6": 1e6 * found, "range": float(np.ptp(elsewhere))})
    assert here.shape == SHAPES[CASES[case].get("image", "scene.png")] and found <= 1e-2
    if "frames" in case:
        for depth in (here, elsewhere):
            same, other = np.abs(depth[0] - depth[2]).max(), np.abs(depth[0] - depth[1]).max()
            assert other > 0.01 and (same < 1e-4 if case == "frames_fixed" else same > 0.01)
    if "ensemble" in case:
        spreads = [raw(folder, f"spread_{case}") for folder in everywhere]
        assert spreads[0].max() > 0.01 and np.abs(spreads[0] - spreads[1]).max() <= 1e-2 * np.ptp(here)


def test_the_loras_own_size_is_what_is_estimated_at(everywhere: tuple[Path, Path]) -> None:
    for folder in everywhere:
        assert np.array_equal(raw(folder, "odd_auto"), raw(folder, "odd_64"))
        assert not np.array_equal(raw(folder, "odd_auto"), raw(folder, "odd_72"))


def test_the_image_decides(everywhere: tuple[Path, Path]) -> None:
    """Of one noise, two images have two depths."""
    depth = raw(everywhere[0], "frames_fixed")
    assert np.abs(depth[0] - depth[1]).mean() > 1e-3


@pytest.mark.parametrize("loader", STOCK)
def test_the_stock_lora_loader_gives_the_same_depth(everywhere: tuple[Path, Path], loader: str) -> None:
    here, elsewhere = everywhere
    assert np.array_equal(raw(here, loader), raw(here, "told"))
    assert np.array_equal(raw(elsewhere, loader), raw(elsewhere, "told"))
    assert apart(raw(here, loader), raw(elsewhere, loader)) <= 1e-2


def test_every_key_of_the_lora_was_loaded(server: ComfyServer, everywhere: tuple[Path, Path]) -> None:
    assert "lora key not loaded" not in server.log.read_text(errors="replace")


def test_the_checkpoint_is_unchanged_after_depth(server: ComfyServer, lora: str, ends: str) -> None:
    """Images of the plain checkpoint and of a LoRA with whole end layers, before depth and while its weights are on."""
    plain, tuned = text_to_image(server, {}, "before"), text_to_image(server, with_lora(ends), "tuned")
    first = in_comfy(server, estimation("first"), "first")
    assert np.array_equal(text_to_image(server, {}, "after"), plain) and plain.std() > 5
    in_comfy(server, estimation("second", seed=1), "second")
    assert np.array_equal(text_to_image(server, with_lora(ends), "tuned_again"), tuned)
    assert np.abs(tuned - plain).mean() > 1.0
    server.run(estimation("third", steps=5))
    assert np.array_equal(in_comfy(server, estimation("fourth"), "fourth"), first)
    server.run(depth_training("after_depth", steps=1))


def stock_sampled(model: list[Any], image: bool, prefix: str, cfg: float = 1.0) -> Graph:
    """A stock KSampler on a model with the depth LoRA, with the image by InstructPixToPixConditioning or without."""
    graph = {**base(CHECKPOINT, prompt="", batch=1), **with_lora(LORA)}
    graph["negative"]["inputs"]["text"] = ""
    graph["image"] = node("LoadImage", image="scene.png")
    options = {"prediction": "auto", "zero_terminal_snr": "auto", "start": "auto", "shift": 1.0}
    graph["flow"] = node("Diff2FlowModel", model=["model", 0], **options)
    graph["seen"] = node(
        "InstructPixToPixConditioning", positive=["positive", 0], negative=["negative", 0], vae=["ckpt", 2],
        pixels=["image", 0],
    )  # fmt: skip
    graph["sample"] = ksampler(model, steps=4, cfg=cfg, scheduler="simple", seed=0)
    if image:
        graph["sample"]["inputs"].update(positive=["seen", 0], negative=["seen", 1], latent_image=["seen", 2])
    return saved(graph, "sample", prefix)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_stock_sampler_estimates_depth_too(server: ComfyServer, lora: str, cfg: float) -> None:
    """InstructPixToPixConditioning, Diff2FlowModel and KSampler: the depth of Diff2Flow Depth, inverted and stretched.

    The prompts are empty, so guidance changes nothing.
    """
    prefix = f"stock_sampler_{cfg:g}"
    [file] = server.run(stock_sampled(["flow", 0], True, prefix, cfg))[prefix]
    depth = in_comfy(server, estimation(f"beside_{cfg:g}"), f"beside_{cfg:g}")[0]
    assert np.abs(np.asarray(pixels([file])[0].mean(axis=-1)) / 255 - depth).max() < 0.01


def failure(server: ComfyServer, graph: Graph) -> str:
    """The message of a prompt that fails; one sentence without a traceback."""
    found = failure_of(server.wait(server.queue(graph)))
    assert found and found["kind"] == "execution_error", found
    message = found["exception_message"].strip()
    print(message)
    assert "\n" not in message and len(message) < 420
    return message


def sampled_with(model: Graph) -> Graph:
    graph = {**base(CHECKPOINT, batch=1), **model}
    graph["sample"] = diff2flow(["model", 0])
    return saved(graph, "sample", "never")


def _light() -> Graph:
    graph = depth_training("never")
    graph["3"]["inputs"]["preset"] = "light"
    return graph


def _without_lora() -> Graph:
    graph = estimation("never", steps=4)
    graph["4"]["inputs"]["model"] = ["1", 0]
    del graph["2"]
    return graph


def watched(name: str, **inputs: Any) -> Graph:
    """The training template with Diff2Flow Train Watch."""
    graph = depth_training(name, steps=2)
    graph["7"] = node(
        "Diff2FlowTrainWatch", vae=["1", 2], clip=["1", 1], sample_every=1, sample_steps="2", cfg=1.0,
        width=64, height=64, seed=0, validate_every=1, held_out_share=0.25, **{"prompts": "", **inputs},
    )  # fmt: skip
    graph["5"]["inputs"]["watch"] = ["7", 0]
    return graph


def test_depth_is_drawn_while_it_is_trained(server: ComfyServer) -> None:
    graph = watched("watched", images=["8", 0])
    graph["8"] = node("LoadImage", image="scene.png")
    server.run(graph)
    run = server.base / "output" / "diff2flow" / "watched"
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if entry["kind"] == "validation"] == [1, 2]
    files = [run / "samples" / name for entry in logged if entry["kind"] == "samples" for name in entry["files"]]
    assert len(files) == 2 and all(pixels([file]).std() > 5 for file in files)


WRONG = {
    "text_sampler": (lambda: sampled_with(with_lora(LORA)), ("Diff2Flow Sampler: model: ", "Diff2Flow Depth")),
    "stock_sampler": (lambda: stock_sampled(["model", 0], False, "never"), ("an image", "Diff2Flow Depth")),
    "stock_flow": (lambda: stock_sampled(["flow", 0], False, "never"), ("an image", "InstructPixToPixConditioning")),
    "plain_model": (_without_lora, ("Diff2Flow Depth: model: ", "Diff2Flow LoRA Loader")),
    "light": (_light, ("lora: ", "'pairs'", "preset 'light'", "'paper-small'")),
    "rgb": (lambda: depth_training("never", "bad/rgb"), ("0.png", "RGB", "not depth")),
    "smaller": (lambda: depth_training("never", "bad/smaller"), ("48×32", "64×64")),
    "invalid": (lambda: depth_training("never", "bad/invalid"), ("none of its depth is valid",)),
    "watched": (lambda: watched("never", **{"prompts": "a disc"}), ("watch: ", "'pairs'", "sample_every")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(server: ComfyServer, lora: str, case: str) -> None:
    graph, words = WRONG[case]
    message = failure(server, graph())
    assert all(word in message for word in words), message
    assert not list(lora_file(server, "never").parent.glob("never*"))


def test_interrupted_depth_training_leaves_the_model_as_it_was(server: ComfyServer, lora: str) -> None:
    before, depth = text_to_image(server, {}, "calm"), in_comfy(server, estimation("calm"), "calm")
    with Events(server.port) as events:
        queued = server.queue(depth_training("stopped", steps=100000, save_every=0), events.client_id)
        events.wait_for("diff2flow.train", lambda data: data["kind"] == "step" and data["step"] >= 2)
        server.post("/interrupt", {})
        assert failure_of(server.wait(queued))["kind"] == "execution_interrupted"
    deadline = time.monotonic() + 30
    while not lora_file(server, "stopped").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert lora_file(server, "stopped").exists()
    assert np.array_equal(text_to_image(server, {}, "calm_again"), before)
    server.run(estimation("other", steps=3))
    assert np.array_equal(in_comfy(server, estimation("again"), "again"), depth)
    server.run(estimation("from_stopped", lora="stopped"))
