"""LoRA layers in a network: nothing changed at first, nothing left behind, the file is what was trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diff2flow_nodes.tests.training_fakes import FILE_NAMES, TinyBackbone, TinyNetwork, TinyText
from diff2flow_nodes.training.adapters import adapted, trainable
from diff2flow_nodes.training.layers import GROUPS, LoraSettings, choose_layers

EVERYTHING = LoraSettings(groups=GROUPS, rank=4, alpha=2.0, ends_in_full=True)
RATIO = LoraSettings(groups=GROUPS, rank_ratio=0.3, alpha=0.0)
DORA = replace(EVERYTHING, dora=True)
STABLE = replace(RATIO, rslora=True, alpha=1.5)
KINDS = pytest.mark.parametrize("settings", [EVERYTHING, RATIO, DORA, STABLE], ids=["rank", "ratio", "dora", "rslora"])


def _call(network, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, context = torch.randn(2, 4, 4, 4, generator=draw), torch.randn(2, 3, 6, generator=draw)
    return network(x, torch.tensor([10.5, 900.0]), context)


def _randomise(adapters):
    """Away from the start; DoRA's lengths stay near the weights'."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


@KINDS
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


@KINDS
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
                change *= state[f"{key}.alpha"] / down.shape[0]
                if f"{key}.dora_scale" in state:  # as ComfyUI's weight_decompose, at strength 1
                    scale = state[f"{key}.dora_scale"]
                    assert scale.shape == (len(layer.weight), *[1] * (layer.weight.ndim - 1))
                    norm = layer.weight.flatten(1).norm(dim=1).reshape(scale.shape)
                    change = (layer.weight + change) * (scale / norm) - layer.weight
                layer.weight += change
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


class CastLinear(nn.Linear):
    """Casts its weights to the input's dtype in the call, as ComfyUI's layers do."""

    def forward(self, x):
        return nn.functional.linear(x, *_cast(self, x.dtype))


class CastConv2d(nn.Conv2d):
    """The same for convolutions."""

    def forward(self, x):
        return self._conv_forward(x, *_cast(self, x.dtype))


def _cast(layer, dtype):
    return layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)


def _stored(network, dtype):
    """The network with layers that cast, their weights in `dtype`."""
    for module in network.modules():
        for child in module._modules.values():
            for plain, cast in ((nn.Linear, CastLinear), (nn.Conv2d, CastConv2d)):
                if type(child) is plain:
                    child.__class__ = cast
                    for key, parameter in child._parameters.items():
                        if parameter is not None:
                            child._parameters[key] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return network


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_stored_weights_stay_what_and_where_they_are(stored, compute, dora):
    network = _stored(TinyBackbone().module, stored)
    layers = choose_layers(network, FILE_NAMES, DORA if dora else EVERYTHING)
    before = {path: (p.data_ptr(), p.dtype) for path, p in ((n, network.get_submodule(n).weight) for n in FILE_NAMES)}
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 4, 4, generator=draw), torch.tensor([10.5, 900.0]), torch.randn(2, 3, 6, generator=draw)
    inputs = [tensor.to(compute) for tensor in inputs]
    bare = network(*inputs)
    if dora and stored == torch.float8_e4m3fn:
        with pytest.raises(ValueError, match="dora: layer .* is stored in float8_e4m3fn"), adapted(network, layers, 0):
            pass
        return
    with adapted(network, layers, seed=0) as adapters:
        assert torch.equal(network(*inputs), bare) and bare.dtype == compute
        _randomise(adapters)
        network(*inputs).float().square().mean().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapters.parameters())
        assert all(p.grad.isfinite().all() for p in adapters.parameters())
        trained = {id(p) for p in adapters.parameters()}
        others = [p for p in network.parameters() if id(p) not in trained]
        assert {p.data_ptr() for p in others} == {pointer for pointer, _ in before.values()} | {
            network.get_submodule(path).bias.data_ptr() for path in FILE_NAMES if path != "inner.text"
        }
        assert {p.dtype for p in others} == {stored}


def test_dora_needs_weights_with_a_direction():
    network = TinyBackbone().module
    with torch.no_grad():
        network.inner["q"].weight[3] = 0
    with (
        pytest.raises(ValueError, match="dora: layer '.*to_q' has an output whose weights are all 0"),
        adapted(network, choose_layers(network, FILE_NAMES, DORA), seed=0),
    ):
        pass
    assert type(network.inner["q"]) is nn.Linear


def test_dora_scales_keep_their_precision():
    network = TinyBackbone().module
    with adapted(network, choose_layers(network, FILE_NAMES, DORA), seed=0) as adapters:
        _randomise(adapters)
        state = adapters.state(torch.float16)
    assert {t.dtype for k, t in state.items() if k.endswith(".dora_scale")} == {torch.float32}
    assert sum(k.endswith(".dora_scale") for k in state) == 7


def test_weights_that_are_not_finite_are_not_exported():
    network = TinyBackbone().module
    with adapted(network, choose_layers(network, FILE_NAMES, EVERYTHING), seed=0) as adapters:
        with torch.no_grad():
            adapters.parameters()[0].fill_(1e6)
        adapters.state(torch.float32)
        with pytest.raises(ValueError, match="conv_in.*not finite"):
            adapters.state(torch.float16)


def test_a_text_encoder_is_trained_beside_the_network():
    backbone = TinyBackbone()
    backbone.text = TinyText()
    context, _ = backbone.text.encode(["a cat", "two cats"])
    settings = replace(EVERYTHING, text_encoder=True, dora=True, include=("conv_in", "*attn1*"))
    with trainable(backbone, settings, seed=0) as adapters:
        assert torch.equal(backbone.text.encode(["a cat", "two cats"])[0], context)
        groups = adapters.groups()
        assert [len(groups[name]) for name in ("unet", "text")] == [2 + 3, 2 * 3] and adapters.trains_text
        assert [id(p) for p in adapters.parameters()] == [id(p) for p in groups["unet"] + groups["text"]]
        assert adapters.size == sum(p.numel() for p in adapters.parameters())
        _randomise(adapters)
        encoded, _ = backbone.text.encode(["a cat", "two cats"])
        backbone(torch.randn(2, 4, 4, 4), torch.tensor([1.0, 2.0]), {"context": encoded}).square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in adapters.parameters())
        state = adapters.state(torch.float16)
    key = "lora_te_text_model_encoder_layers_0"
    assert f"{key}_self_attn_q_proj.lora_down.weight" in state and f"{key}_mlp_fc1.dora_scale" in state
    assert type(backbone.text.layers["q"]) is nn.Linear and backbone.text.layers["q"].weight.requires_grad
    assert torch.equal(backbone.text.encode(["a cat", "two cats"])[0], context)


def test_the_text_encoder_alone_and_none_at_all():
    backbone = TinyBackbone()
    settings = LoraSettings(groups=(), text_encoder=True)
    with pytest.raises(ValueError, match="text_encoder is on, but training has no text encoder"):
        trainable(backbone, settings, seed=0).__enter__()
    backbone.text = TinyText()
    with trainable(backbone, settings, seed=0) as adapters:
        assert adapters.groups()["unet"] == [] and len(adapters.parameters()) == 4
        assert all(key.startswith("lora_te_") for key in adapters.state())
    backbone.text.modules = {"lora_te": nn.ModuleDict({"q": nn.Embedding(3, 4)})}
    with pytest.raises(ValueError, match="has none of CLIP's attention and mlp layers"):
        trainable(backbone, settings, seed=0).__enter__()


def test_the_count_is_told_before_the_first_step():
    backbone = TinyBackbone()
    total = sum(p.numel() for p in backbone.module.parameters())
    with trainable(backbone, EVERYTHING, seed=0) as adapters:
        assert adapters.share == adapters.size / total and not adapters.trains_text
        share = 100 * adapters.size / total
        assert adapters.describe == (
            f"training {adapters.size / 1e6:.2f} M of {total / 1e6:.2f} M parameters ({share:.2f} %)"
        )
    with adapted(backbone.module, choose_layers(backbone.module, FILE_NAMES, EVERYTHING), seed=0) as older:
        assert older.share == adapters.share
