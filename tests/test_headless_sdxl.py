"""SDXL without ComfyUI: names and shapes, prompts, sizes, sampling, LoRAs and training, on tiny random weights."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from diff2flow_nodes import hosts
from diff2flow_nodes.alignment import NoiseSchedule
from diff2flow_nodes.bench import ldm_layout
from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.hosts.headless import HeadlessHost, core_nodes, prompts, tokens
from diff2flow_nodes.hosts.headless.unet_layout import UnetLayout
from diff2flow_nodes.nodes import Diff2FlowImageDataset, Diff2FlowLoraConfig, Diff2FlowTrain
from diff2flow_nodes.tests.headless_fixtures import CONTEXT, SDXL_TEXT, make_checkpoint, text_encoder_weights

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other

LATENT = {"samples": torch.zeros(2, 4, 8, 16)}
PROMPT = "a (red:1.4) digit on ((grey)) paper"
LONG = "many words " * 50
WIDTH, POOLED = SDXL_TEXT


def make(host, name, **options):
    path = host.folder("checkpoints") / name
    return make_checkpoint(path, "SDXL", **{"channels": (32, 64), "attended": (False, True), **options})


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("sdxl"), list(hosts._chosen)
    made = HeadlessHost(place / "models", place / "input", place / "output")
    make(made, "xl.safetensors")
    hosts.use(made)
    yield made
    hosts._chosen[:] = before


@pytest.fixture(scope="module")
def loaded(host):
    return host.load_checkpoint("xl.safetensors")


@pytest.fixture(scope="module")
def conditions(host, loaded):
    return host.encode_text(loaded[1], PROMPT), host.encode_text(loaded[1], "")


def sampled(model, conditions, cfg=3.0, steps=2, latent=LATENT):
    return core_nodes.KSampler().sample(model, 5, steps, cfg, "euler", "normal", *conditions, latent, 1.0)[0]["samples"]


def changed(host, name, change):
    """The tiny checkpoint's file under another name, its tensors changed."""
    state = load_file(host.path("checkpoints", "xl.safetensors"))
    change(state)
    save_file(state, str(host.folder("checkpoints") / name))
    return name


# names and shapes

KNOWN = {
    "SDXL": (2, (0, 2, 10), ((10,) * 3, (2,) * 3, (1,) * 3), "UNetMidBlock2DCrossAttn"),
    "SSD-1B": (2, (0, 2, 4), ((4, 4, 10), (2, 1, 1), (1,) * 3), "UNetMidBlock2D"),
    "Segmind Vega": (2, (0, 1, 2), ((2,) * 3, (1,) * 3, (1,) * 3), "UNetMidBlock2D"),
    "KOALA 700M": (1, (0, 2, 5), ((5,) * 2, (2,) * 2, (1,) * 2), None),
    "KOALA 1B": (1, (0, 2, 6), ((6,) * 2, (2,) * 2, (1,) * 2), "UNetMidBlock2DCrossAttn"),
}
"""Blocks a level, depth of the down levels, depths of the up blocks, and the middle, as their authors made them."""


@pytest.mark.parametrize("name", KNOWN)
def test_networks_of_the_family(name):
    blocks, down, up, middle = KNOWN[name]
    with torch.device("meta"):
        original = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            layers_per_block=blocks,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type=middle,
            transformer_layers_per_block=tuple((max(depth, 1),) * blocks for depth in down),
            reverse_transformer_layers_per_block=up,
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ).state_dict()
    shapes = ldm_layout.unet_to_ldm(original, blocks)
    layout = UnetLayout(shapes, "x")
    assert (layout.family, layout.pooled_width, layout.context_width) == ("SDXL", 1280, 2048)
    assert layout.config["attention_head_dim"] == (5, 10, 20)
    with torch.device("meta"):
        module = UNet2DConditionModel(**layout.config)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in original.items()}
    assert sorted(map(layout.to_diffusers, shapes)) == sorted(original)


def test_facts(host, loaded):
    model, clip, _ = loaded
    facts = host.facts(model)
    assert (facts.family, facts.prediction, facts.in_channels) == ("SDXL", "eps", 4)
    assert facts.schedule == NoiseSchedule.scaled_linear()
    assert model.base.latent_scale == 0.13025 and list(clip.towers) == ["l", "g"]
    assert model.base.layer_names["lora_unet_label_emb_0_2"] == "add_embedding.linear_2"


@pytest.mark.parametrize(
    ("markers", "prediction", "zero"),
    [(("v_pred",), "v", False), (("v_pred", "ztsnr"), "v", True), (("ztsnr",), "eps", False)],
)
def test_prediction_is_what_comfyui_says(host, markers, prediction, zero):
    make(host, "v.safetensors", markers=markers, text=False)
    facts = host.facts(host.load_checkpoint("v.safetensors")[0])
    assert facts.prediction == prediction and facts.schedule.is_zero_terminal_snr == zero


PREFIX = "model.diffusion_model."
OTHERS = {
    "Playground": lambda s: s.update(edm_mean=torch.zeros(4), edm_std=torch.ones(4)),
    "v prediction": lambda s: s.update({"edm_vpred.sigma_max": torch.tensor(80.0)}),
    "refiner": lambda s: [
        s.update({key: torch.zeros(len(s[key]), 1280)}) for key in list(s) if key.endswith("attn2.to_k.weight")
    ],
    "upscaler": lambda s: s.update({f"{PREFIX}label_emb.weight": torch.zeros(1000, 256)}),
    "only one of SDXL's 2 text encoders": lambda s: [
        s.pop(key) for key in list(s) if key.startswith("conditioner.embedders.1")
    ],
    "conditioner.embedders.1.model.text_projection": lambda s: s.pop("conditioner.embedders.1.model.text_projection"),
    "add_embedding.linear_2.bias": lambda s: s.pop(f"{PREFIX}label_emb.0.2.bias"),
    "text encoders of width 128 and a UNet that takes 64": lambda s: [
        s.update({key: s[key][:, :64].contiguous()})
        for key in list(s) if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    ],
}  # fmt: skip


@pytest.mark.parametrize("words", OTHERS)
def test_what_is_no_sdxl_is_refused(host, loaded, words):
    name = changed(host, "other.safetensors", OTHERS[words])
    with pytest.raises(HostError) as raised:
        host.load_checkpoint(name)
    assert name in str(raised.value) and words in str(raised.value) and "\n" not in str(raised.value)


# prompts


def ids_of(prompt, pad):
    return torch.tensor([chunk.ids for chunk in prompts.chunks(prompt, tokens.tokenize, pad)])


def block_by_block(weights, ids):
    """OpenCLIP's layers, written out on its own weights: every layer's output (chunks, 77, width), then the norm's."""
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    mask = torch.full((77, 77), -math.inf).triu(1)
    outputs = []
    for i in range(3):
        part = {k.removeprefix(f"transformer.resblocks.{i}."): v for k, v in weights.items()}
        y = norm(x, part, "ln_1").movedim(0, 1)
        attended, _ = functional.multi_head_attention_forward(
            y, y, y, y.shape[-1], 1, part["attn.in_proj_weight"], part["attn.in_proj_bias"], None, None, False, 0.0,
            part["attn.out_proj.weight"], part["attn.out_proj.bias"], training=False, attn_mask=mask,
        )  # fmt: skip
        x = x + attended.movedim(0, 1)
        wide = functional.gelu(linear(norm(x, part, "ln_2"), part, "mlp.c_fc"))
        x = x + linear(wide, part, "mlp.c_proj")
        outputs.append(x)
    return [*outputs, norm(x, weights, "ln_final")]


def norm(x, weights, name):
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def linear(x, weights, name):
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def weights_of(prefix):
    state = text_encoder_weights("SDXL")
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}


def clip_l(ids):
    """transformers' model on the file's own weights: the last layer but one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=1, vocab_size=49408,
        hidden_act="quick_gelu", eos_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    outer = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    weights = weights_of("0.transformer.text_model.")
    model.load_state_dict({f"{outer}{k}": v for k, v in weights.items()})
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-2]


def test_the_encoding_of_a_prompt(host, loaded):
    """Both encoders at the last layer but one, without the final norm; bigG's projected pooled output."""
    [[context, more]] = host.encode_text(loaded[1], "two cats")
    low_ids, big_ids = ids_of("two cats", 49407), ids_of("two cats", 0)
    assert low_ids[0, 5] == 49407 and big_ids[0, 5] == 0
    big = weights_of("1.model.")
    layers = block_by_block(big, big_ids)
    assert context.shape == (1, 77, CONTEXT["SDXL"])
    assert torch.allclose(context[..., :WIDTH], clip_l(low_ids), atol=1e-5)
    assert torch.allclose(context[..., WIDTH:], layers[-3], atol=1e-5)
    end = int((big_ids[0] == 49407).nonzero()[0])
    assert torch.allclose(more["pooled_output"], layers[-1][:, end] @ big["text_projection"], atol=1e-5)


def test_weights_and_chunks_are_each_encoders_own(host, loaded):
    [[plain, _]], [[weighted, _]] = (host.encode_text(loaded[1], text) for text in ("a cat", "a (cat:1.5)"))
    big = weights_of("1.model.")
    empty = block_by_block(big, ids_of("", 0))[-3]
    word = 2  # after start and "a"
    expected = empty[:, word] + 1.5 * (plain[:, word, WIDTH:] - empty[:, word])
    assert torch.allclose(weighted[:, word, WIDTH:], expected, atol=1e-5)
    assert torch.equal(weighted[:, 0], plain[:, 0])
    [[context, more]] = host.encode_text(loaded[1], LONG)
    assert context.shape == (1, 154, 128) and more["pooled_output"].shape == (1, POOLED)


SIZES = {"width": 1024, "height": 768, "crop_w": 4, "crop_h": 8, "target_width": 640, "target_height": 512}


def encoded_sdxl(clip, text_g, text_l):
    return core_nodes.CLIPTextEncodeSDXL().encode(clip, *SIZES.values(), text_g, text_l)[0]


def test_a_prompt_for_each_encoder(host, loaded):
    clip = loaded[1]
    [[context, more]] = encoded_sdxl(clip, LONG, "a cat")
    long, short, none = (host.encode_text(clip, text)[0] for text in (LONG, "a cat", ""))
    assert torch.equal(context[..., WIDTH:], long[0][..., WIDTH:])
    assert torch.equal(more["pooled_output"], long[1]["pooled_output"])
    assert torch.allclose(context[:, :77, :WIDTH], short[0][..., :WIDTH], atol=1e-6)
    assert torch.allclose(context[:, 77:, :WIDTH], none[0][..., :WIDTH], atol=1e-6)
    assert {name: more[name] for name in SIZES} == SIZES
    assert list(core_nodes.CLIPTextEncodeSDXL.INPUT_TYPES()["required"]) == ["clip", *SIZES, "text_g", "text_l"]
    with pytest.raises(HostError, match="textual inversion"):
        core_nodes.CLIPTextEncodeSDXL.VALIDATE_INPUTS("a", "embedding:x")


# sizes


def embedded(numbers):
    """256 sinusoids a number: 128 cosines, then 128 sines, of frequencies from 1 down to almost 1/10000."""
    frequencies = [10000 ** (-i / 128) for i in range(128)]
    return torch.tensor([f(n * w) for n in numbers for f in (math.cos, math.sin) for w in frequencies])


def heard_by(module):
    """What the network's embedding of pooled text and sizes is called with."""
    heard = []
    module.add_embedding.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0]))
    return heard


def test_sizes_come_in_comfyuis_order(host, loaded, conditions):
    """The pooled text, then height, width, crop's top and left, target height and width."""
    module, heard = loaded[0].base.weights.module, heard_by(loaded[0].base.weights.module)
    positive = encoded_sdxl(loaded[1], "a cat", "a cat")
    try:
        sampled(loaded[0], (positive, conditions[1]), steps=1)
    finally:
        module.add_embedding._forward_pre_hooks.clear()
    given, default = (768, 1024, 8, 4, 512, 640), (64, 128, 0, 0, 64, 128)
    sides = ((positive, given), (conditions[1], default))
    expected = [torch.cat([side[0][1]["pooled_output"][0], embedded(sizes)]) for side, sizes in sides]
    assert heard[0].shape == (4, POOLED + 1536)
    for row, side in zip(heard[0], (0, 0, 1, 1), strict=True):  # two items a side
        assert torch.allclose(row, expected[side], atol=1e-3)


def test_the_backbone_tells_every_item_its_own_sizes(host, loaded, conditions):
    [[context, more]] = conditions[0]
    sizes = torch.tensor([[768, 1024, 8, 4, 512, 640], [64, 64, 0, 0, 64, 64]])
    with torch.no_grad(), host.training(loaded[0]) as backbone:
        heard = heard_by(backbone.module)
        pooled = torch.cat([more["pooled_output"], more["pooled_output"] * 2])
        given = backbone.conditioning(context.repeat(2, 1, 1), pooled, sizes)
        out = backbone(torch.randn(2, 4, 8, 8), torch.tensor([3.5, 900.0]), given)
        assert out.shape == (2, 4, 8, 8) and torch.isfinite(out).all()
        for row, size, text in zip(heard[0], sizes.tolist(), pooled, strict=True):
            assert torch.allclose(row, torch.cat([text, embedded(size)]), atol=1e-3)
        assert torch.equal(backbone.scale_latent(torch.ones(1)), torch.tensor([0.13025]))
        with pytest.raises(HostError, match="pooled"):
            backbone.conditioning(context, None, sizes)


# sampling


def test_samples_are_finite_and_heed_prompt_pooled_text_and_sizes(loaded, conditions):
    model, (positive, negative) = loaded[0], conditions
    one = sampled(model, conditions)
    assert one.shape == (2, 4, 8, 16) and torch.isfinite(one).all()
    assert torch.equal(one, sampled(model, conditions))
    [[context, more]], [[other, beside]] = positive, negative
    for changed_ in ([[other, more]], [[context, beside]], [[context, {**more, "width": 2048}]]):
        assert not torch.allclose(sampled(model, (changed_, negative)), one, atol=1e-4)
    zeroed = core_nodes.ConditioningZeroOut().zero_out(negative)[0]
    assert torch.isfinite(sampled(model, (positive, zeroed))).all()


def test_the_latents_scale_is_sdxls(host, loaded, conditions):
    """Nothing to denoise: what is given comes back; noise of std 1 at the end is 1/0.13025 in the autoencoder's."""
    image = {"samples": torch.randn(1, 4, 8, 8)}
    noise = torch.randn(image["samples"].shape, generator=torch.manual_seed(5))
    sampler = host.sampler(lambda denoiser, x, *_, **__: x, {})
    out = host.sample(loaded[0], *conditions, image, 5, sampler, torch.tensor([2.0, 0.0]), 1.0)["samples"]
    assert torch.allclose(out, image["samples"] + 2.0 * noise / 0.13025, atol=1e-4)


def test_the_image_beside_the_latents(host):
    """As ComfyUI hands it on: to 8-channel networks as it is, to 9-channel ones (after the mask) in their scale."""
    image, seen = torch.randn(1, 4, 8, 8), {}
    for channels in (8, 9):
        make(host, "beside.safetensors", in_channels=channels, text=False)
        model = host.load_checkpoint("beside.safetensors")[0]
        conv = model.base.weights.module.conv_in
        conv.register_forward_pre_hook(lambda _, arguments, channels=channels: seen.update({channels: arguments[0]}))
        more = {"pooled_output": torch.zeros(1, POOLED), "concat_latent_image": image}
        side = [[torch.zeros(1, 77, 128), {**more, "concat_mask": torch.ones(1, 64, 64)}]]
        sampled(model, (side, side), cfg=1.0, steps=1, latent={"samples": image * 0})
    assert torch.allclose(seen[8][:, 4:], image) and torch.allclose(seen[9][:, 5:], image * 0.13025, atol=1e-6)
    assert torch.equal(seen[9][:, 4:5], torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda context, more: [context, {}], "pooled_output"),
        (lambda context, more: [context, {"pooled_output": torch.zeros(1, 768)}], "768 wide"),
        (lambda context, more: [context[..., :64], more], "takes 128"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_conditioning_of_another_model_is_refused(loaded, conditions, change, words, side):
    pair = list(conditions)
    pair[side] = [change(*pair[side][0])]
    with pytest.raises(HostError, match=words):
        sampled(loaded[0], pair)


def test_prompts_for_two_encoders_need_two(host):
    make_checkpoint(host.folder("checkpoints") / "sd1.safetensors")
    with pytest.raises(HostError, match="choose an SDXL checkpoint"):
        encoded_sdxl(host.load_checkpoint("sd1.safetensors")[1], "a", "a")


# LoRA


def lora(name, outputs, inputs, *kernel):
    draw = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn(2, inputs, *kernel, generator=draw),
        f"{name}.lora_up.weight": torch.randn(outputs, 2, *[1] * len(kernel), generator=draw),
    }


BLOCK = "transformer_blocks_1_attn1_to_q"
SAME = (
    (f"lora_unet_input_blocks_3_1_{BLOCK}", (64, 64)),
    ("diffusion_model.input_blocks.3.1.transformer_blocks.1.attn1.to_q", (64, 64)),
    (f"lora_unet_down_blocks_1_attentions_0_{BLOCK}", (64, 64)),
    (f"lycoris_down_blocks_1_attentions_0_{BLOCK}", (64, 64)),
    ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", (64, 64)),
    ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.processor.to_q", (64, 64)),
    ("lora_unet_label_emb_0_0", (128, 1600)),
    ("lora_unet_add_embedding_linear_1", (128, 1600)),
    ("lora_unet_class_embedding_linear_1", (128, 1600)),
)


@pytest.mark.parametrize(("name", "shape"), SAME)
def test_spellings_of_unet_layers(loaded, host, name, shape):
    patched, _ = host.apply_lora(loaded[0], None, lora(name, *shape), 1.0, None)
    module = "add_embedding.linear_1" if shape[0] == 128 else (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    )  # fmt: skip
    assert [patch.target for patch in patched.patches] == [f"{module}.weight"]


LAYER = "encoder.layers.1.self_attn.q_proj"
FLAT = "text_model_encoder_layers_1_self_attn_q_proj"


@pytest.mark.parametrize(
    ("name", "key", "module"),
    [
        (f"lora_te1_{FLAT}", "l", LAYER),
        (f"lora_te_{FLAT}", "l", LAYER),
        (f"text_encoder.text_model.{LAYER}", "l", LAYER),
        (f"text_encoders.clip_l.transformer.text_model.{LAYER}", "l", LAYER),
        (f"lora_te2_{FLAT}", "g", LAYER),
        (f"text_encoder_2.text_model.{LAYER}", "g", LAYER),
        ("lora_te2_text_projection", "g", "projection"),
    ],
)
def test_spellings_of_text_layers(host, loaded, name, key, module):
    """A LoRA of one encoder changes that one alone, by up @ down."""
    clip, state = loaded[1], lora(name, 64, 64)
    _, patched = host.apply_lora(None, clip, state, 0.5, None)
    [[before, old]], [[after, new]] = (c.encode("a cat") for c in (clip, patched))
    assert torch.equal(before[..., :WIDTH], after[..., :WIDTH]) == (key != "l")
    assert torch.equal(before[..., WIDTH:], after[..., WIDTH:]) == (key != "g" or module == "projection")
    assert torch.equal(old["pooled_output"], new["pooled_output"]) == (key != "g")
    delta = 0.5 * state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
    merged, base = (dict(m.named_parameters()) for m in (patched.weights.merged(patched.patches), clip.weights.module))
    [target] = [n for n in base if n.startswith(f"{key}.") and n.endswith(f"{module}.weight")]
    assert torch.allclose(merged[target], base[target] + delta, atol=2e-3 * float(delta.abs().max()))
    assert host.fingerprint(patched) != host.fingerprint(clip)


def test_a_lora_for_another_family_is_refused(host, loaded):
    with pytest.raises(HostError, match="SDXL"):
        host.apply_lora(loaded[0], None, lora("lora_unet_input_blocks_9_1_proj_in", 64, 64), 1.0, None)


# training


def test_trained_here_and_loaded_again(host, loaded, conditions):
    """A LoRA of SGM names, which gives the trained model's samples when it is loaded from its file."""
    pictures = host.folder("input") / "ink"
    pictures.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 30, 90)).save(pictures / f"{i}.png")
    model, clip, vae = loaded
    before = sampled(model, conditions)
    dataset = Diff2FlowImageDataset().build("ink", vae, clip, 64, default_caption="ink")[0]
    [settings] = Diff2FlowLoraConfig().build("paper-small", 16, 16.0)
    made = Diff2FlowTrain().train(model, dataset, settings, "diff2flow", 3, 2, 0.05, 0, output_name="ink")
    tuned, name, *_ = made["result"]
    state = load_file(host.path("loras", name))
    layers = {key.split(".")[0].removeprefix("lora_unet_") for key in state}
    assert {"input_blocks_0_0", "out_2", "input_blocks_3_1_proj_in"} <= layers
    assert all(layer.startswith(("input_blocks_", "middle_block_", "output_blocks_", "out_")) for layer in layers)
    stock = core_nodes.LoraLoader().load(model, clip, name, 1.0, 1.0)[0]
    expected = sampled(tuned, conditions)
    assert torch.allclose(sampled(stock, conditions), expected, atol=1e-4)
    assert not torch.allclose(expected, before, atol=1e-2) and torch.equal(sampled(model, conditions), before)
    assert host.facts(tuned).loras[-1]["diff2flow.base_family"] == "SDXL"


def test_every_layer_has_its_sgm_name(host, loaded):
    with host.training(loaded[0]) as backbone:
        names = backbone.layer_names()
        weighted = {name for name, module in backbone.module.named_modules() if hasattr(module, "weight")}
    assert set(names) == weighted and len(set(names.values())) == len(names)
    assert names["add_embedding.linear_1"] == "label_emb.0.0" and names["conv_out"] == "out.2"
    assert names["down_blocks.1.attentions.0.proj_in"] == "input_blocks.3.1.proj_in"
