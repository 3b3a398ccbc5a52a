"""Which layers the presets choose, and how many parameters that is on the full-size networks (DESIGN §4)."""

import pytest
import torch

from diff2flow_nodes.tests.training_fakes import FILE_NAMES, TinyBackbone
from diff2flow_nodes.training.layers import GROUPS, PRESETS, LoraSettings, choose_layers, patterns

SIZES = {
    ("SD15", "paper-small"): 60_988_228,
    ("SD21", "paper-small"): 61_512_516,
    ("SD15", "paper-base"): 214_237_380,
    ("SD21", "paper-base"): 207_428_932,
}


@pytest.fixture(scope="module")
def unets():
    diffusers = pytest.importorskip("diffusers")
    up, down = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3), (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    common = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": down, "up_block_types": up}
    sd21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    with torch.device("meta"):
        return {
            "SD15": diffusers.UNet2DConditionModel(**common, cross_attention_dim=768, attention_head_dim=8),
            "SD21": diffusers.UNet2DConditionModel(**common, **sd21),
        }


@pytest.mark.parametrize(("network", "preset"), SIZES)
def test_the_papers_presets_have_the_papers_sizes(unets, network, preset):
    unet = unets[network]
    names = {name: name for name, module in unet.named_modules() if hasattr(module, "weight")}
    size = sum(layer.size for layer in choose_layers(unet, names, PRESETS[preset]))
    assert size == SIZES[network, preset]


def test_the_light_preset_is_what_kohya_trains(unets):
    unet = unets["SD15"]
    names = {name: name for name, module in unet.named_modules() if hasattr(module, "weight")}
    layers = choose_layers(unet, names, PRESETS["light"])
    assert len(layers) == 192  # kohya's networks.lora on SD1.5's UNet
    assert sum(layer.size for layer in layers) == 6_782_976


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (("*attn*",), (), ["inner.q", "inner.text", "inner.text_out"]),
        (("*attn*", "conv_in"), ("*attn2*",), ["first", "inner.q"]),
        ((), ("*.attentions.*", "time*"), ["first", "last", "mix"]),
        (("down_blocks.0.resnets.?.conv[12]",), (), ["mix"]),
    ],
)
def test_patterns_narrow_the_groups_down(include, exclude, chosen):
    settings = LoraSettings(groups=GROUPS, ends_in_full=True, include=include, exclude=exclude)
    layers = choose_layers(TinyBackbone().module, FILE_NAMES, settings)
    assert sorted(layer.path for layer in layers) == chosen
    narrow = LoraSettings(groups=("self_attention",), include=("*attn*",))
    assert [layer.path for layer in choose_layers(TinyBackbone().module, FILE_NAMES, narrow)] == ["inner.q"]


def test_patterns_that_match_nothing_are_named():
    def choose(**settings):
        choose_layers(TinyBackbone().module, FILE_NAMES, LoraSettings(**{"groups": GROUPS, **settings}))

    for kind in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{kind}: the pattern '\*mid_block\*' matches no layer.*'down_blocks"):
            choose(**{kind: ("*attn*", "*mid_block*")})
    with pytest.raises(ValueError, match="include and exclude leave nothing of the 1 layers"):
        choose(groups=("time",), include=("*attn*",))
    with pytest.raises(ValueError, match="leave nothing"):
        choose(exclude=("*",))
    assert patterns(" *attn2*,\nup_blocks.1* \n\n,") == ("*attn2*", "up_blocks.1*")
    assert patterns("") == ()


def test_scales_of_rslora_and_sizes_of_dora():
    plain, dora, stable = (
        choose_layers(TinyBackbone().module, FILE_NAMES, LoraSettings(groups=("conv",), rank=4, alpha=2.0, **extra))
        for extra in ({}, {"dora": True}, {"rslora": True})
    )
    assert [(layer.scale, layer.file_alpha) for layer in plain] == [(0.5, 2.0)] * 2
    assert [(layer.scale, layer.file_alpha) for layer in stable] == [(1.0, 4.0)] * 2
    assert [layer.size for layer in dora] == [layer.size + 16 for layer in plain]


@pytest.mark.parametrize(
    ("group", "chosen"),
    [
        ("self_attention", ["inner.q"]),
        ("cross_attention", ["inner.text"]),
        ("attention_out", ["inner.text_out"]),
        ("feed_forward", ["inner.ff"]),
        ("proj", ["inner.into"]),
        ("time", ["time"]),
        ("conv", ["inner.into", "mix"]),
    ],
)
def test_groups(group, chosen):
    layers = choose_layers(TinyBackbone().module, FILE_NAMES, LoraSettings(groups=(group,)))
    assert sorted(layer.path for layer in layers) == chosen


SGM = {
    "input_blocks.0.0": None,
    "time_embed.0": "time",
    "label_emb.0.2": "time",
    "input_blocks.1.0.in_layers.2": "conv",
    "input_blocks.1.0.emb_layers.1": "time",
    "input_blocks.3.0.op": "conv",
    "input_blocks.4.0.skip_connection": "conv",
    "input_blocks.4.1.proj_in": "proj",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_v": "self_attention",
    "middle_block.1.transformer_blocks.9.attn2.to_out.0": "attention_out",
    "output_blocks.2.1.transformer_blocks.0.ff.net.2": "feed_forward",
    "output_blocks.2.2.conv": "conv",
    "out.2": None,
}


@pytest.mark.parametrize("name", SGM)
def test_groups_of_sdxls_names(name):
    group = SGM[name]
    layer = torch.nn.Conv2d(4, 4, 3) if group in (None, "conv") else torch.nn.Linear(4, 4)
    network = torch.nn.ModuleDict({"layer": layer})

    def chosen(groups):
        settings = LoraSettings(groups=groups, ends_in_full=True)
        return [layer.rank for layer in choose_layers(network, {"layer": name}, settings)]

    if group is None:
        assert chosen(("conv",)) == [0]
        return
    assert chosen((group,)) == [16]
    with pytest.raises(ValueError, match="no layer"):
        chosen(tuple(g for g in GROUPS if g != group))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": ("heads",)}, "heads"),
        ({"groups": ()}, "nothing to train"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"rank_ratio": 1.5}, "rank_ratio"),
        ({"alpha": float("nan")}, "alpha"),
        ({"full": True, "dora": True}, "dora is for LoRAs"),
        ({"full": True, "include": ("*",)}, "include is for LoRAs"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**values)
