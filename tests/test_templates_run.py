"""Every template runs headless, on tiny random weights: from the folder of images to the pictures and the LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diff2flow_nodes import hosts
from diff2flow_nodes.bench.templates.words import TEMPLATES
from diff2flow_nodes.cli import main
from diff2flow_nodes.depth.files import read_depth
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint
from diff2flow_nodes.tests.tiny_templates import CHECKPOINT, LORAS, NEEDS, PICTURES, SIDE, tiny, write_inputs

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Runs a template, after the one that makes its LoRA; gives the folder of models, input and output."""
    place, before, done = tmp_path_factory.mktemp("templates"), list(hosts._chosen), set()
    make_checkpoint(place / "models" / "checkpoints" / CHECKPOINT, vae="means")
    write_inputs(place / "input")

    def once(name: str) -> Path:
        if name in NEEDS:
            once(NEEDS[name])
        if name not in done:
            workflow = place / f"{name}.json"
            workflow.write_text(json.dumps(tiny(name)))
            folders = [f"--{folder}={place / folder}" for folder in ("models", "input", "output")]
            assert main(["run", str(workflow), *folders]) == 0
            done.add(name)
        return place

    yield once
    hosts._chosen[:] = before


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_saves_its_pictures(run: Callable[[str], Path], name: str) -> None:
    output = run(name) / "output"
    for beginning in PICTURES[name]:
        [picture] = output.glob(f"{beginning}_0*.png")
        assert min(Image.open(picture).size) >= 56


@pytest.mark.parametrize("name", LORAS)
def test_it_saves_its_lora(run: Callable[[str], Path], name: str) -> None:
    file = run(name) / "models" / "loras" / f"{LORAS[name]}.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, keys = opened.metadata(), list(opened.keys())
        changed = sum(float(opened.get_tensor(key).abs().sum()) for key in keys if key.endswith("lora_up.weight"))
    assert changed > 0 and metadata["diff2flow.objective"] == "diff2flow"
    few = {"reflow": ("4", "1"), "depth_training": ("10", "1")}.get(name, ("25", "7"))
    assert (metadata["diff2flow.recommended_steps"], metadata["diff2flow.recommended_cfg"]) == few
    assert metadata["diff2flow.start"] == ("noise" if name == "black_white" else "terminal")


def test_few_steps_takes_steps_and_cfg_from_the_lora(run: Callable[[str], Path]) -> None:
    """And ComfyUI's own sampler draws what Diff2Flow Sampler draws."""
    output = run("few_steps") / "output" / "few_steps"
    ours, stock = (Image.open(next(output.glob(f"{name}_0*.png"))).convert("RGB") for name in ("image", "own_sampler"))
    apart = [abs(a - b) for a, b in zip(ours.tobytes(), stock.tobytes(), strict=True)]
    assert max(apart) <= 2 and len(set(ours.tobytes())) > 10


def test_depth_has_the_images_size_and_is_raw(run: Callable[[str], Path]) -> None:
    [raw] = (run("depth_estimation") / "output" / "depth").glob("raw_*.exr")
    depth = read_depth(raw)
    assert depth.shape == (56, 64) and depth.isfinite().all() and depth.std() > 0


def test_depth_training_widens_the_first_layer(run: Callable[[str], Path]) -> None:
    with safe_open(run("depth_training") / "models" / "loras" / "my_depth_lora.safetensors", "pt") as file:
        assert file.get_tensor("lora_unet_conv_in.reshape_weight").tolist() == [32, 8, 3, 3]
        assert file.metadata()["modelspec.resolution"] == f"{SIDE}x{SIDE}"


def test_the_folders_images_and_black_and_white_are_trained(run: Callable[[str], Path]) -> None:
    with safe_open(run("black_white") / "models" / "loras" / "my_black_white_lora.safetensors", "pt") as file:
        assert file.metadata()["diff2flow.dataset"].startswith("6 images of 64×64 px, 3 different captions")
