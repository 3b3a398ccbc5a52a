"""DoRA files in the headless host: the network that was trained, and ComfyUI's reading of both kinds of dora_scale."""

import pytest
import torch

from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.hosts.headless.lora import _patches
from diff2flow_nodes.hosts.headless.weights import Weights
from diff2flow_nodes.hosts.lora_fit import Target, fitting
from diff2flow_nodes.tests.training_fakes import FILE_NAMES, TinyBackbone
from diff2flow_nodes.training.adapters import adapted
from diff2flow_nodes.training.layers import GROUPS, LoraSettings, choose_layers
from diff2flow_nodes.training.lora_kinds import Change


@pytest.mark.parametrize("rslora", [False, True])
def test_the_file_is_the_network_that_was_trained(rslora):
    network = TinyBackbone().module
    settings = LoraSettings(groups=GROUPS, rank=4, alpha=2.0, ends_in_full=True, dora=True, rslora=rslora)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([10.5, 900.0]), torch.randn(2, 3, 6)
    with adapted(network, choose_layers(network, FILE_NAMES, settings), seed=0) as adapters, torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        trained, state = network(*inputs), adapters.state()
    names = {"lora_unet_" + name.replace(".", "_"): path for path, name in FILE_NAMES.items()}
    shapes = {name: network.get_submodule(path).weight.shape for name, path in names.items()}
    found = fitting(state, Target(shapes, "SD1", has_clip=False)).changes
    with torch.no_grad():
        merged = Weights(network).merged(_patches(found, (network, names), 1.0))(*inputs)
        assert (merged - network(*inputs)).abs().max() > 0.05
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_a_scale_for_each_input_counts_the_changed_weights(shape):
    weight, up, down = torch.randn(shape), torch.randn(6, 2), torch.randn(2, *shape[1:])
    scale = torch.rand(1, 4, *[1] * (len(shape) - 2)) + 0.5
    lora = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0), "dora_scale": scale}
    change = Change("LoRA", lora)
    patched = change.apply(weight, 1.0)
    lengths = patched.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, scale.flatten(), rtol=1e-5, atol=1e-6)
    half = change.apply(weight, 0.5)
    torch.testing.assert_close(half, (weight + patched) / 2, rtol=1e-5, atol=1e-6)


def test_a_scale_of_another_size_is_named():
    state = {
        "lora_unet_a.lora_down.weight": torch.ones(2, 4),
        "lora_unet_a.lora_up.weight": torch.ones(6, 2),
        "lora_unet_a.dora_scale": torch.ones(5, 1),
    }
    with pytest.raises(HostError, match=r"a dora_scale of shape \(5, 1\) where the model has 6 outputs and 4 inputs"):
        fitting(state, Target({"lora_unet_a": (6, 4)}, "SD1", has_clip=False))
