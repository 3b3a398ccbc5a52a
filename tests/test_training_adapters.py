"""LoRA layers in a network: nothing changed at first, nothing left behind, the file is what was trained."""

import pytest
import torch
from torch import nn

from diff2flow_nodes.tests.training_fakes import FILE_NAMES, TinyBackbone, TinyNetwork
from diff2flow_nodes.training.adapters import adapted
from diff2flow_nodes.training.layers import GROUPS, LoraSettings, choose_layers

EVERYTHING = LoraSettings(groups=GROUPS, rank=4, alpha=2.0, ends_in_full=True)
RATIO = LoraSettings(groups=GROUPS, rank_ratio=0.3, alpha=0.0)


def _call(network, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, context = torch.randn(2, 4, 4, 4, generator=draw), torch.randn(2, 3, 6, generator=draw)
    return network(x, torch.tensor([10.5, 900.0]), context)


def _randomise(adapters):
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


@pytest.mark.parametrize("settings", [EVERYTHING, RATIO], ids=["rank", "ratio"])
def test_a_fresh_lora_changes_nothing_to_the_bit(settings):
    network = TinyBackbone().module
    before = _call(network)
    layers = choose_layers(network, FILE_NAMES, settings)
    with adapted(network, layers, seed=0):
        assert torch.equal(_call(network), before)


def test_removal_restores_the_very_objects_even_after_an_interruption():
    network = TinyBackbone().module
    network.first.requires_grad_(False)
    modules = {name: module for name, module in network.named_modules()}
    parameters = {name: (p, p.requires_grad, p.clone()) for name, p in network.named_parameters()}
    attributes, state = set(vars(network)), torch.random.get_rng_state()
    with (
        pytest.raises(KeyboardInterrupt),
        adapted(network, choose_layers(network, FILE_NAMES, EVERYTHING), 0) as adapters,
    ):
        assert dict(network.named_modules()).keys() != modules.keys()
        _randomise(adapters)
        raise KeyboardInterrupt
    assert dict(network.named_modules()) == modules
    assert {name: p for name, p in network.named_parameters()}.keys() == parameters.keys()
    for name, p in network.named_parameters():
        original, required, value = parameters[name]
        assert p is original and p.requires_grad == required and torch.equal(p, value)
    assert set(vars(network)) == attributes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_the_added_layers_are_trained():
    network = TinyBackbone().module
    layers = choose_layers(network, FILE_NAMES, EVERYTHING)
    with adapted(network, layers, seed=0) as adapters:
        trained = {id(p) for p in network.parameters() if p.requires_grad}
        assert trained == {id(p) for p in adapters.parameters()}
        assert adapters.size == sum(p.numel() for p in adapters.parameters())
        assert all(p.dtype == torch.float32 for p in adapters.parameters())


@pytest.mark.parametrize("settings", [EVERYTHING, RATIO], ids=["rank", "ratio"])
def test_the_file_added_to_the_weights_is_the_trained_network(settings):
    network = TinyBackbone().module
    with adapted(network, choose_layers(network, FILE_NAMES, settings), seed=0) as adapters:
        _randomise(adapters)
        trained, state = _call(network), adapters.state()
    assert not torch.allclose(trained, _call(network), atol=1e-2)
    _merge(network, state)
    torch.testing.assert_close(_call(network), trained, rtol=1e-5, atol=1e-5)


def _merge(network, state):
    with torch.no_grad():
        for path, name in FILE_NAMES.items():
            key, layer = "lora_unet_" + name.replace(".", "_"), network.get_submodule(path)
            if f"{key}.lora_down.weight" in state:
                down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
                change = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
                layer.weight += change * (state[f"{key}.alpha"] / down.shape[0])
            if f"{key}.diff" in state:
                layer.weight += state[f"{key}.diff"]
                layer.bias += state[f"{key}.diff_b"]


def test_keys_and_shapes_are_kohyas():
    network = TinyBackbone().module.to(memory_format=torch.channels_last)
    with adapted(network, choose_layers(network, FILE_NAMES, EVERYTHING), seed=0) as adapters:
        state = adapters.state(torch.float16)
    assert all(tensor.is_contiguous() for tensor in state.values())  # safetensors takes no other
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert state[f"{conv}.lora_down.weight"].shape == (4, 16, 3, 3)
    assert state[f"{conv}.lora_up.weight"].shape == (16, 4, 1, 1)
    assert state[f"{linear}.lora_down.weight"].shape == (4, 16)
    assert state[f"{linear}.alpha"] == 2.0
    assert state["lora_unet_conv_in.diff"].shape == (16, 4, 3, 3)
    assert state["lora_unet_conv_out.diff_b"].shape == (4,)
    assert {t.dtype for k, t in state.items() if not k.endswith(".alpha")} == {torch.float16}


def test_the_first_weights_depend_on_the_seed_and_not_on_the_order_of_modules():
    class Reordered(TinyNetwork):
        def named_modules(self, *args, **kwargs):
            yield from reversed(list(super().named_modules(*args, **kwargs)))

    def first_state(network, seed):
        with adapted(network, choose_layers(network, FILE_NAMES, EVERYTHING), seed) as adapters:
            return adapters.state()

    one, other = first_state(TinyNetwork(), 7), first_state(Reordered(), 7)
    assert all(torch.equal(one[key], other[key]) for key in one)
    changed = first_state(TinyNetwork(), 8)
    assert any(not torch.equal(one[key], changed[key]) for key in one)


def test_paths_that_end_alike_are_told_apart():
    network = nn.ModuleDict({"q": nn.Linear(4, 4), "deep": nn.ModuleDict({"q": nn.Linear(4, 8)})})
    names = {"q": "a.attn1.to_q", "deep.q": "b.proj_in"}
    layers = choose_layers(network, names, LoraSettings(groups=("self_attention",), rank=2))
    with adapted(network, layers, seed=0):
        assert isinstance(network["deep"]["q"], nn.Linear) and not hasattr(network["deep"]["q"], "lora_A")
        assert hasattr(network["q"], "lora_A")


def test_a_frozen_half_precision_network_trains_in_float32():
    network = TinyBackbone().module.to(torch.bfloat16)
    with adapted(network, choose_layers(network, FILE_NAMES, EVERYTHING), seed=0) as adapters:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _call(network).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())
    assert network.first.weight.dtype == torch.bfloat16


def test_weights_that_are_not_finite_are_not_exported():
    network = TinyBackbone().module
    with adapted(network, choose_layers(network, FILE_NAMES, EVERYTHING), seed=0) as adapters:
        with torch.no_grad():
            adapters.parameters()[0].fill_(1e6)
        adapters.state(torch.float32)
        with pytest.raises(ValueError, match="conv_in.*not finite"):
            adapters.state(torch.float16)
