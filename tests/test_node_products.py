"""Nodes that write: what they say of it, and that an unchanged graph writes again what is gone."""

import shutil

import pytest
import torch
from PIL import Image

from diff2flow_nodes import hosts
from diff2flow_nodes.nodes import (
    Diff2FlowImageDataset,
    Diff2FlowLoraConfig,
    Diff2FlowReflowPairs,
    Diff2FlowSaveDepth,
    Diff2FlowTrain,
)
from diff2flow_nodes.tests.training_fakes import FakeHost, tiny_dataset


@pytest.fixture
def host(tmp_path):
    host, before = FakeHost(tmp_path), list(hosts._chosen)
    hosts.use(host)
    yield host
    hosts._chosen[:] = before


WIDGETS = {"objective": "diff2flow", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}


def trained(folder, **inputs):
    [lora] = Diff2FlowLoraConfig().build("light", 16, 16.0)
    return Diff2FlowTrain().train("model", tiny_dataset(folder / "data"), lora, **{**WIDGETS, **inputs})


def asked(**inputs):
    """What IS_CHANGED says of widgets; links are None there."""
    return Diff2FlowTrain.IS_CHANGED(**{"model": None, "dataset": None, "lora": None, **WIDGETS, **inputs})


def test_train_says_its_file_its_steps_and_its_loss(host, tmp_path):
    first = trained(tmp_path, output_name="told")
    again = trained(tmp_path, output_name="told", seed=1)
    assert first["ui"]["file"] == ["told.safetensors"] and again["ui"]["file"] == ["told_00002.safetensors"]
    assert again["ui"]["file"] == [again["result"][1]] and first["ui"]["steps"] == [2]
    events = [each["loss"] for each in host.progress_bar.events if each["kind"] == "step"]
    assert again["ui"]["last_loss"] == events[-1:] and again["ui"]["mean_loss"] == [sum(events[-2:]) / 2]


def test_a_lora_that_is_gone_is_written_again(host, tmp_path):
    before = asked(output_name="gone")
    trained(tmp_path, output_name="gone")
    trained(tmp_path, output_name="gone", seed=1)
    assert asked(output_name="gone") == asked(output_name="gone", seed=1) == before, "taken from memory"
    (host.folder("loras") / "gone.safetensors").unlink()
    changed = asked(output_name="gone")
    assert changed != before and asked(output_name="gone", seed=1) == before, "of another run"
    assert asked(output_name=None) != before, "linked: it may be that one"
    [name] = trained(tmp_path, output_name="gone")["ui"]["file"]
    assert (host.folder("loras") / name).exists() and asked(output_name="gone") == changed, "from memory again"
    (host.folder("loras") / name).unlink()
    assert asked(output_name="gone") not in (before, changed)


def test_saved_depth_that_is_gone_is_written_again(host):
    frames = torch.rand(2, 4, 4, 1).expand(-1, -1, -1, 3)
    made = Diff2FlowSaveDepth().save(frames, "shot/depth", "npy")
    assert made["ui"] == {"file": ["shot/depth_00001.npy", "shot/depth_00002.npy"], "notes": []}
    widgets = {"depth": None, "filename_prefix": "shot/depth", "format": "npy"}
    before = Diff2FlowSaveDepth.IS_CHANGED(**widgets)
    (host.folder("output") / "shot" / "depth_00002.npy").unlink()
    assert Diff2FlowSaveDepth.IS_CHANGED(**widgets) != before
    assert Diff2FlowSaveDepth.IS_CHANGED(**{**widgets, "format": "exr"}) == before


def test_pairs_and_encoded_images_that_are_gone_are_made_again(host):
    pairs = {"prompts": "a fox", "count": 2, "steps": 1, "cfg": 1.0, "seed": 0, "folder": "pairs"}
    made = Diff2FlowReflowPairs().build("model", "clip", **pairs, width=32, height=32)
    assert made["ui"] == {"folder": ["pairs"], "pairs": [2], "notes": []}
    (host.folder("input") / "ink").mkdir()
    Image.new("RGB", (32, 32)).save(host.folder("input") / "ink" / "0.png")
    Diff2FlowImageDataset().build("ink", "vae", "clip", 32, default_caption="ink")

    def found():
        images = Diff2FlowImageDataset.IS_CHANGED("ink", resolution=32)
        return Diff2FlowReflowPairs.IS_CHANGED(model=None, clip=None, **pairs), images

    before = found()
    assert found() == before
    shutil.rmtree(host.folder("datasets"))
    assert all(one != other for one, other in zip(found(), before, strict=True))
