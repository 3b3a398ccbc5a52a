"""The training nodes on a small host: from a folder to a LoRA and a picture of the loss."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from diff2flow_nodes import hosts
from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.nodes import (
    Diff2FlowImageDataset,
    Diff2FlowImages,
    Diff2FlowLoraConfig,
    Diff2FlowLossConfig,
    Diff2FlowOptimizerConfig,
    Diff2FlowTrain,
    Diff2FlowTrainWatch,
)
from diff2flow_nodes.tests.training_fakes import FakeHost, SilentProgress
from diff2flow_nodes.training.layers import PRESETS
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.plot import loss_plot, running_mean

NODES = [
    Diff2FlowImageDataset,
    Diff2FlowImages,
    Diff2FlowLoraConfig,
    Diff2FlowLossConfig,
    Diff2FlowOptimizerConfig,
    Diff2FlowTrain,
    Diff2FlowTrainWatch,
]


@pytest.fixture
def host(tmp_path):
    host, before = FakeHost(tmp_path), list(hosts._chosen)
    hosts.use(host)
    pictures = host.folder("input") / "ink"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (60 * i, 0, 90)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"drawing {i}")
    yield host
    hosts._chosen[:] = before


def _dataset():
    return Diff2FlowImageDataset().build("ink", "vae", "clip", 32)[0]


def _train(dataset, **inputs):
    [lora] = Diff2FlowLoraConfig().build("light", 16, 16.0)
    values = {
        "objective": "diff2flow",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "seed": 0,
        "output_name": "ink",
    }
    return Diff2FlowTrain().train("model", dataset, lora, **{**values, **inputs})["result"]


def test_queued_again_after_stop_and_save_it_runs_again(host, monkeypatch):
    values = {"output_name": "ink", "steps": 3, "model": None}
    assert Diff2FlowTrain.IS_CHANGED(**values) == 0
    _train(_dataset())
    assert Diff2FlowTrain.IS_CHANGED(**values) == 0
    monkeypatch.setattr(SilentProgress, "command", lambda self: "stop")
    assert _train(_dataset(), output_name="stopped", seed=1)[1] == "stopped.safetensors"
    changed = [Diff2FlowTrain.IS_CHANGED(output_name=name) for name in ("stopped", "ink", None)]
    assert changed == [1, 0, 1]


def test_from_a_folder_to_a_lora(host):
    dataset, summary = Diff2FlowImageDataset().build("ink", "vae", "clip", 32, trigger="inkstyle")
    assert "3 images of 32×32 px" in summary and len(host.encoded) == 3 + 4
    [loss] = Diff2FlowLossConfig().build(t_range="full")
    model, name, picture, clip = _train(dataset, recommended_steps=9, recommended_cfg=3.5, loss=loss)
    assert (model, name, clip) == ("model+lora", "ink.safetensors", None)
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    [(state, strength, metadata)] = host.applied
    saved, saved_metadata = load_lora(host.folder("loras") / name)
    assert strength == 1.0 and metadata == saved_metadata
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    assert metadata["diff2flow.recommended_steps"] == "9" and metadata["diff2flow.recommended_cfg"] == "3.5"
    assert metadata["diff2flow.start"] == "noise"
    assert list((host.folder("datasets") / "ink").glob("latents-*"))


def test_an_empty_clip_that_is_used_is_refused_before_training(host):
    """Whatever takes it could only say that some checkpoint has no text encoder."""
    dataset = _dataset()
    graph = {"7": {"class_type": "Diff2FlowTrain", "inputs": {"steps": 3}},
             "9": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["7", 3]}}}  # fmt: skip
    with pytest.raises(HostError) as caught:
        _train(dataset, prompt=graph, unique_id="7")
    assert str(caught.value).startswith("Diff2Flow Train: clip: nothing is connected")
    assert "CLIPTextEncode (node 9, clip)" in str(caught.value) and host.backbone.batch_sizes == []
    clip = object()
    assert _train(dataset, prompt=graph, unique_id="7", clip=clip)[3] is clip
    assert _train(dataset, prompt=graph, unique_id="8", output_name="other")[3] is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"steps": 0}, "Diff2Flow Train: steps must be at least 1, not 0"),
        ({"batch_size": 0}, "Diff2Flow Train: batch_size"),
        ({"learning_rate": -1.0}, "Diff2Flow Train: learning_rate"),
        ({"output_name": "../x"}, "Diff2Flow Train: output_name: the name '../x' is not allowed"),
        ({"objective": "flow"}, "Diff2Flow Train: objective must be one of"),
    ],
)
def test_bad_inputs_are_named_before_training(host, inputs, message):
    dataset = _dataset()
    with pytest.raises(ValueError) as caught:
        _train(dataset, **inputs)
    assert str(caught.value).startswith(message) and host.backbone.batch_sizes == []
    assert list(host.folder("loras").iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "there is no 'nowhere'"), ("../out", "not allowed"), ("", "is empty"), ("ink/0.png", "is a file")],
)
def test_bad_folders_are_named(host, folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        Diff2FlowImageDataset().build(folder, "vae", "clip", 32)
    assert str(caught.value).startswith("Diff2Flow Image Dataset: folder: ")
    assert message in str(Diff2FlowImageDataset.VALIDATE_INPUTS(folder))


def test_an_absolute_folder_is_told_its_name(host, tmp_path):
    inside = host.folder("input") / "ink"
    for folder, message in (
        (str(inside), "it is an absolute path, and names are those inside the folder 'input'; give 'ink'"),
        ("/elsewhere/ink", "what lies elsewhere must be copied there first"),
        ("C:\\pictures", "it is an absolute path"),
        ("ink/", "the name 'ink/' ends with a slash; give 'ink'"),
    ):
        with pytest.raises(ValueError) as caught:
            Diff2FlowImageDataset().build(folder, "vae", "clip", 32)
        assert message in str(caught.value) and message in str(Diff2FlowImageDataset.VALIDATE_INPUTS(folder))


def test_a_checkpoint_without_vae_or_text_encoder_is_named(host):
    class Empty:
        """ComfyUI's VAE object of a checkpoint that has none."""

        first_stage_model = None

    for vae, clip, message in (
        (None, "clip", "vae: the checkpoint that it comes from holds no VAE; connect the VAE of a full checkpoint"),
        (Empty(), "clip", "vae: the checkpoint that it comes from holds no VAE"),
        ("vae", None, "clip: the checkpoint that it comes from holds no text encoder; connect the CLIP of"),
    ):
        with pytest.raises(ValueError, match=f"^Diff2Flow Image Dataset: {message}"):
            Diff2FlowImageDataset().build(folder="ink", vae=vae, clip=clip, resolution=32)
        with pytest.raises(ValueError, match=f"^Diff2Flow Images: {message}"):
            Diff2FlowImages().build(images=torch.rand(1, 32, 32, 3), captions="", vae=vae, clip=clip)


def test_inputs_are_checked_before_anything_runs(host):
    assert Diff2FlowImageDataset.VALIDATE_INPUTS("ink") is True
    assert Diff2FlowImageDataset.VALIDATE_INPUTS() is True
    assert Diff2FlowTrain.VALIDATE_INPUTS("styles/ink") is True
    assert "output_name" in str(Diff2FlowTrain.VALIDATE_INPUTS("../ink"))


def test_an_interruption_goes_through_the_node_with_the_lora_saved(host):
    dataset = _dataset()
    host.progress_bar = SilentProgress(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        _train(dataset, steps=5)
    assert load_lora(host.folder("loras") / "ink.safetensors")[1]["ss_steps"] == "2"


def test_a_change_in_the_folder_is_seen(host):
    before = Diff2FlowImageDataset.IS_CHANGED("ink")
    assert Diff2FlowImageDataset.IS_CHANGED("ink", None, None, 64, "", "") == before
    (host.folder("input") / "ink" / "0.txt").write_text("another caption")
    assert Diff2FlowImageDataset.IS_CHANGED("ink") != before


def test_a_dataset_of_many_sizes_trains_and_says_so(host):
    folder = host.folder("input") / "ink"
    (folder / "4_gold").mkdir()
    Image.new("RGBA", (64, 32), (9, 9, 9, 99)).save(folder / "4_gold" / "wide.png")
    dataset, summary = Diff2FlowImageDataset().build(
        "ink", "vae", "clip", 64, bucketing="aspect", bucket_step=8, resolutions="32", flips=True, alpha="mask"
    )
    assert "8 images of 4 sizes" in summary and "14 with repeats" in summary and "8 also mirrored" in summary
    assert "2 with a mask" in summary
    _train(dataset)
    metadata = host.applied[0][2]
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "ink": {"n_repeats": 1, "img_count": 3},
        "4_gold": {"n_repeats": 4, "img_count": 1},
    }
    assert metadata["ss_enable_bucket"] == "True" and metadata["ss_resolution"] == "(64, 64)"
    assert metadata["ss_num_train_images"] == "14" and metadata["ss_num_batches_per_epoch"] == "8"
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"]
    assert [bucket["count"] for bucket in buckets.values()] == [3, 4, 3, 4]
    assert json.loads(metadata["ss_tag_frequency"])["4_gold"] == {"gold": 1}


def test_images_of_the_graph_train_alone_and_with_a_folder(host):
    images = torch.rand(2, 32, 32, 3)
    alone, summary = Diff2FlowImages().build(images, "red\nblue", "vae", "clip")
    assert len(alone) == 2 and "2 images of 32×32 px, 2 different captions, from 'graph_images'" in summary
    assert list((host.folder("datasets") / "graph_images").glob("latents-*"))
    joined, summary = Diff2FlowImages().build(images, "", "vae", "clip", repeats=3, dataset=_dataset())
    assert len(joined) == 5 and "9 with repeats: 3 × 1 in 'ink', 2 × 3 in 'graph_images'" in summary
    assert host.encoded.count("image") == 5
    _train(joined)
    with pytest.raises(ValueError, match="Diff2Flow Images: dataset: 'ink' and 'graph_images' were made with diff"):
        Diff2FlowImages().build(images, "", "another vae", "clip", dataset=_dataset())
    with pytest.raises(ValueError, match="Diff2Flow Images: name: the name '../x' is not allowed"):
        Diff2FlowImages().build(images, "", "vae", "clip", name="../x")
    assert (
        "not allowed" in str(Diff2FlowImages.VALIDATE_INPUTS("../x")) and Diff2FlowImages.VALIDATE_INPUTS("x") is True
    )


def test_resolutions_are_checked_before_anything_runs(host):
    assert Diff2FlowImageDataset.VALIDATE_INPUTS("ink", "32, 64") is True
    assert "resolutions takes pixels" in str(Diff2FlowImageDataset.VALIDATE_INPUTS("ink", "large"))


def test_a_change_in_a_folder_of_repeats_is_seen(host):
    inputs = inspect.signature(Diff2FlowImageDataset.build).parameters
    assert list(inspect.signature(Diff2FlowImageDataset.IS_CHANGED).parameters) == list(inputs)[1:]
    before = Diff2FlowImageDataset.IS_CHANGED("ink")
    (host.folder("input") / "ink" / "2_x").mkdir()
    Image.new("RGB", (8, 8)).save(host.folder("input") / "ink" / "2_x" / "a.png")
    assert Diff2FlowImageDataset.IS_CHANGED("ink") != before


def test_presets_and_custom():
    def build(*inputs, **more):
        made = Diff2FlowLoraConfig().build(*inputs, **more)
        return made["result"] if isinstance(made, dict) else made

    assert [build(preset, 3, 1.0)[0] for preset in PRESETS] == list(PRESETS.values())
    [custom] = build(
        "custom", 8, 4.0, self_attention=False, feed_forward=False, conv=True, time=True, ends_in_full=True
    )
    assert custom.groups == ("cross_attention", "attention_out", "proj", "time", "conv")
    assert (custom.rank, custom.alpha, custom.ends_in_full) == (8, 4.0, True)
    [narrow] = build(
        "paper-small", 8, 8.0, include="*attn2*", exclude="a,\nb", dora=True, rslora=True, text_encoder=True
    )
    assert (narrow.include, narrow.exclude) == (("*attn2*",), ("a", "b")) and narrow.rank == 64
    assert narrow.dora and narrow.rslora and narrow.text_encoder and not narrow.full
    assert build("full", 8, 8.0)[0].full
    with pytest.raises(ValueError, match="Diff2Flow LoRA Config: dora is for LoRAs"):
        build("full", 8, 8.0, dora=True)
    with pytest.raises(ValueError, match="Diff2Flow LoRA Config: preset must be one of"):
        build("large", 8, 8.0)
    with pytest.raises(ValueError, match="Diff2Flow LoRA Config: rank must be at least 1"):
        build("custom", 0, 8.0)


LATER = "recipe"
"""New nodes begin with a recipe; workflows that were saved before there was one have none."""


@pytest.mark.parametrize("node", NODES)
def test_every_input_is_explained_and_defaults_agree(node):
    declared = node.INPUT_TYPES()
    inputs = {**declared["required"], **declared.get("optional", {})}
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert list(parameters)[1:] == [*inputs, *declared.get("hidden", {})]
    for name, (_, options) in inputs.items():
        assert len(options["tooltip"]) > 20, name
        if name in declared.get("optional", {}) and name != LATER:
            assert options.get("default") == parameters[name].default, name
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert node.CATEGORY == "Diff2Flow/training" and node.DESCRIPTION


def test_the_plot_takes_one_loss_and_many():
    for losses in ([0.5], [0.0, 0.0], [1.0 / (i + 1) for i in range(300)]):
        picture = loss_plot(losses, "ink")
        assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.01
    assert running_mean([2.0] * 50) == pytest.approx([2.0] * 50)


def test_importing_the_nodes_imports_no_heavy_library():
    heavy = "{'peft', 'matplotlib', 'diffusers', 'transformers', 'safetensors'} & set(sys.modules)"
    code = f"import sys; import diff2flow_nodes.nodes.training; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
