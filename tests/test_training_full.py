"""Full finetuning: every parameter trained, the originals put back, a whole checkpoint written."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diff2flow_nodes.tests.training_fakes import TinyBackbone, tiny_dataset
from diff2flow_nodes.training.adapters import trainable
from diff2flow_nodes.training.checkpoint_file import read_contents, save_checkpoint, trained_metadata
from diff2flow_nodes.training.layers import PRESETS
from diff2flow_nodes.training.metadata import Run, checkpoint_metadata
from diff2flow_nodes.training.settings import TrainSettings

FULL = PRESETS["full"]
PREFIX = "model.diffusion_model."


@pytest.fixture
def backbone(tmp_path):
    """A half-precision network, and its base checkpoint with a projection stored as a linear layer's."""
    backbone = TinyBackbone()
    backbone.module.to(torch.bfloat16).requires_grad_(False)
    backbone.module.last.bias.requires_grad_(True)
    state = {PREFIX + name: p.detach().clone() for name, p in backbone.module.named_parameters()}
    state[f"{PREFIX}inner.into.weight"] = state[f"{PREFIX}inner.into.weight"].flatten(1)
    state[f"{PREFIX}first.weight"] = state[f"{PREFIX}first.weight"].half()
    others = {"alphas_cumprod": torch.rand(7, dtype=torch.float64), "cond_stage_model.ids": torch.arange(5)}
    backbone.base_path = tmp_path / "base.safetensors"
    save_file({**others, **state, "v_pred": torch.tensor([])}, backbone.base_path, {"license": "x", "format": "pt"})
    return backbone


def _step(backbone):
    x, context = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 6)
    output = backbone.module(x.to(backbone.dtype), torch.tensor([10.5, 900.0]), context.to(backbone.dtype))
    output.float().square().mean().backward()
    return output


def test_everything_is_trained_and_put_back_even_after_an_interruption(backbone):
    network, backbone.dtype = backbone.module, torch.bfloat16
    before = {name: (p, p.requires_grad, p.clone(), p.data_ptr()) for name, p in network.named_parameters()}
    total = sum(p.numel() for p in network.parameters())
    with pytest.raises(KeyboardInterrupt), trainable(backbone, FULL, seed=0) as full:
        assert full.size == total == sum(p.numel() for p in full.parameters()) and full.share == 1.0
        assert full.describe.endswith("parameters (100.00 %)") and not full.trains_text
        assert full.groups()["unet"] and backbone.dtype == torch.float32
        assert all(torch.equal(dict(network.named_parameters())[name], p.float()) for name, (p, *_) in before.items())
        optimizer = torch.optim.AdamW(full.parameters(), lr=0.1)
        assert _step(backbone).dtype == torch.float32
        assert all(p.grad.dtype == p.dtype == torch.float32 for p in full.parameters())
        optimizer.step()
        raise KeyboardInterrupt
    assert backbone.dtype == torch.bfloat16
    for name, parameter in network.named_parameters():
        original, required, value, pointer = before[name]
        assert parameter is original and parameter.requires_grad == required and parameter.grad is None
        assert torch.equal(parameter, value) and parameter.data_ptr() == pointer


def test_shared_parameters_stay_shared(backbone):
    backbone.module.inner["ff"].weight = backbone.module.inner["q"].weight
    with trainable(backbone, FULL, seed=0) as full:
        inner = backbone.module.inner
        assert inner["ff"].weight is inner["q"].weight
        assert len(full.parameters()) == len(list(backbone.module.parameters())) == len(full.tensors) - 1
    assert inner["ff"].weight is inner["q"].weight


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_the_checkpoint_is_the_base_with_the_trained_network(backbone, tmp_path, dtype):
    base = load_file(backbone.base_path)
    path = tmp_path / "out" / "tuned.safetensors"
    with trainable(backbone, FULL, seed=0) as full:
        with torch.no_grad():
            for parameter in full.parameters():
                parameter.mul_(1.25)
        metadata = save_checkpoint(path, backbone.base_path, full.tensors, {"diff2flow.version": "1"}, dtype)
        expected = full.state()
    saved = load_file(path)
    assert saved.keys() == base.keys()
    for key, tensor in saved.items():
        assert tensor.shape == base[key].shape
        if key.startswith(PREFIX):
            assert tensor.dtype == (dtype or base[key].dtype)
            assert torch.equal(tensor.flatten(), expected[key].to(tensor.dtype).flatten())
        else:
            assert tensor.dtype == base[key].dtype and torch.equal(tensor, base[key])
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    assert metadata["license"] == "x" and trained_metadata(path) == metadata
    assert trained_metadata(backbone.base_path) == {} and trained_metadata(tmp_path / "none.safetensors") == {}
    assert [file.name for file in path.parent.iterdir()] == ["tuned.safetensors"]


def test_what_is_not_finite_leaves_no_file(backbone, tmp_path):
    path = tmp_path / "tuned.safetensors"
    with trainable(backbone, FULL, seed=0) as full:
        with torch.no_grad():
            full.parameters()[-1].fill_(1e6)
        with pytest.raises(ValueError, match=r"last.bias' is not finite in torch.float16"):
            save_checkpoint(path, backbone.base_path, full.tensors, {}, torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_missing_base_is_named_before_training(backbone, tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            trainable(backbone, FULL, seed=0).__enter__()
        assert all(p.dtype == torch.bfloat16 for p in backbone.module.parameters())

    content = backbone.base_path.read_bytes()
    backbone.base_path.write_bytes(content[:-8])
    refused("'base.safetensors' cannot be read .*cut short")
    state = load_file_of(content, tmp_path)
    save_file({key: t for key, t in state.items() if "last.bias" not in key}, backbone.base_path)
    refused(r"'base.safetensors' has no tensor 'model.diffusion_model.last.bias'")
    save_file({**state, f"{PREFIX}last.bias": torch.ones(5)}, backbone.base_path)
    refused("has another size")
    backbone.base_path = tmp_path / "base.ckpt"
    refused("must be a .safetensors file, not 'base.ckpt'")
    backbone.base_path = None
    refused("load the model by Diff2Flow Checkpoint Loader")


def load_file_of(content, folder):
    path = folder / "copy.safetensors"
    path.write_bytes(content)
    return load_file(path)


def test_headers_that_lie_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for content in (b"", b"\xff" * 9, (500).to_bytes(8, "little") + header, (3).to_bytes(8, "little") + b"[1]"):
        path = tmp_path / "lie.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="the checkpoint 'lie.safetensors' cannot be read"):
            read_contents(path)


def test_its_metadata_is_a_checkpoints(backbone, tmp_path):
    dataset, settings = tiny_dataset(tmp_path / "data"), TrainSettings(2)
    run = Run("tuned", backbone, dataset, FULL, settings, 2, 1000, 25, 7.0, 0.0, share=1.0)
    metadata = checkpoint_metadata(run)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["diff2flow.trained_parameters"] == "1000" and metadata["diff2flow.trained_share"] == "1"
    assert not any(key.startswith("ss_") for key in metadata)
    assert all(isinstance(value, str) for value in metadata.values())


def test_a_full_network_has_no_lora_layers(backbone):
    with trainable(backbone, FULL, seed=0):
        assert type(backbone.module.first) is nn.Conv2d
