"""Checkpoints, sampling, LoRA and training on tiny models with random weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.bench import ldm_layout
from diff2flow_nodes.hosts import HostError, use
from diff2flow_nodes.hosts.fingerprint import digest
from diff2flow_nodes.hosts.headless import HeadlessHost, checkpoint, core_nodes, prompts
from diff2flow_nodes.hosts.headless.noise_levels import StockLevels
from diff2flow_nodes.hosts.headless.schedules import sigmas_for
from diff2flow_nodes.hosts.headless.text_training import HeadlessText
from diff2flow_nodes.hosts.headless.tokens import tokenize
from diff2flow_nodes.hosts.headless.unet_layout import UnetLayout
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint, unet_weights
from diff2flow_nodes.training.checkpoint_file import Marks

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    place = tmp_path_factory.mktemp("headless")
    made = HeadlessHost(place / "models", place / "input", place / "output")
    make_checkpoint(made.folder("checkpoints") / "tiny.safetensors")
    return made


@pytest.fixture(scope="module")
def loaded(host):
    use(host)
    return host.load_checkpoint("tiny.safetensors")


@pytest.fixture(scope="module")
def conditions(host, loaded):
    return host.encode_text(loaded[1], "a (red:1.4) digit"), host.encode_text(loaded[1], "")


LATENT = {"samples": torch.zeros(1, 4, 8, 8)}


def sampled(host, model, conditions, steps=2, cfg=3.0, latent=LATENT, seed=5, **more):
    use(host)
    inputs = {"scheduler": "normal", "denoise": 1.0, **more}
    positive, negative = conditions
    return core_nodes.KSampler().sample(
        model, seed, steps, cfg, "euler", inputs["scheduler"], positive, negative, latent, inputs["denoise"]
    )[0]["samples"]


def weights(path):
    state = load_file(path)
    return {key: value.clone() for key, value in state.items()}


def variant(host, name, **options):
    """A checkpoint without text encoder, loaded; context comes from nowhere but its width."""
    make_checkpoint(host.folder("checkpoints") / name, text=False, **options)
    model, clip, vae = host.load_checkpoint(name)
    assert clip is None
    width = model.base.layout.config["cross_attention_dim"]
    context = torch.randn(1, 77, width, generator=torch.Generator().manual_seed(0))
    return model, vae, ([[context, {}]], [[context * 0, {}]])


# checkpoints


def test_facts(host, loaded):
    facts = host.facts(loaded[0])
    assert (facts.family, facts.prediction, facts.in_channels) == ("SD1", "eps", 4)
    assert facts.schedule == NoiseSchedule.scaled_linear() and facts.flow is None and facts.loras == ()


def test_sampling_is_seeded(host, loaded, conditions):
    one = sampled(host, loaded[0], conditions)
    assert one.shape == (1, 4, 8, 8) and torch.isfinite(one).all()
    assert torch.equal(one, sampled(host, loaded[0], conditions))
    assert not torch.equal(one, sampled(host, loaded[0], conditions, seed=6))


@pytest.mark.parametrize(
    "options, facts",
    [
        ({"channels": (32, 64), "attended": (True, False)}, ("SD1", "eps", 4)),
        ({"channels": (32, 32, 64), "attended": (False, True, True), "vae": "kl"}, ("SD1", "eps", 4)),
        ({"family": "SD2", "channels": (32, 64)}, ("SD2", "eps", 4)),
        ({"family": "SD2", "markers": ("v_pred", "ztsnr")}, ("SD2", "v", 4)),
        ({"in_channels": 9}, ("SD1", "eps", 9)),
    ],
    ids=["two levels", "three levels", "SD2", "v and zero terminal SNR", "inpainting"],
)
def test_layouts(host, options, facts):
    model, _, conditions = variant(host, "variant.safetensors", **options)
    found = host.facts(model)
    assert (found.family, found.prediction, found.in_channels) == facts
    assert found.schedule.is_zero_terminal_snr == ("ztsnr" in options.get("markers", ()))
    assert torch.isfinite(sampled(host, model, conditions, steps=1)).all()


def test_sd2_text_encoder(host):
    make_checkpoint(host.folder("checkpoints") / "sd2.safetensors", "SD2", vae="none")
    _, clip, vae = host.load_checkpoint("sd2.safetensors")
    [[context, more]] = host.encode_text(clip, "a cat")
    assert vae is None and context.shape == (1, 77, 1024) and more["pooled_output"].shape == (1, 1024)
    assert clip.towers["h"].layer == 1 and clip.towers["h"].kind.pad == 0
    with pytest.raises(HostError, match="no autoencoder"):
        host.encode_image(vae, torch.zeros(1, 8, 8, 3))


def test_v_prediction_of_sd2_is_told_by_its_biases():
    def prediction(spread, channels=4):
        unet = ldm_layout.unet_to_ldm(unet_weights("SD2", (32,) * 4, (True,) * 4, channels), blocks=1)
        unet["output_blocks.11.1.transformer_blocks.0.norm1.bias"] = torch.tensor([-1.0, 1.0]) * spread
        return checkpoint._prediction(unet, Marks(), UnetLayout(unet, "x"))

    assert [prediction(0.1), prediction(0.08), prediction(0.1, channels=9)] == ["v", "eps", "eps"]


@pytest.mark.parametrize(
    "heads, context, linear, family", [(8, 768, False, "SD1"), ((5, 10, 20, 20), 1024, True, "SD2")]
)
def test_the_full_size_networks(heads, context, linear, family):
    """SD1.5's and SD2.1's own configurations, on the meta device."""
    with torch.device("meta"):
        original = UNet2DConditionModel(
            attention_head_dim=heads, cross_attention_dim=context, use_linear_projection=linear
        ).state_dict()
    layout = UnetLayout(ldm_layout.unet_to_ldm(original, blocks=2), "x")
    assert layout.family == family and layout.config["attention_head_dim"] == heads
    with torch.device("meta"):
        module = UNet2DConditionModel(**layout.config)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in original.items()}
    assert set(map(layout.to_diffusers, layout.parameters)) == set(original)


def test_uneven_levels_are_read():
    shapes = ldm_layout.unet_to_ldm(unet_weights("SD1", (32, 64), (True, False)), blocks=1)
    layout = UnetLayout(shapes, "x")
    assert [level.blocks for level in layout.levels] == [1, 1]
    assert layout.to_diffusers("input_blocks.2.0.op.weight") == "down_blocks.0.downsamplers.0.conv.weight"
    assert layout.to_diffusers("output_blocks.1.1.conv.bias") == "up_blocks.0.upsamplers.0.conv.bias"
    assert layout.to_diffusers("output_blocks.3.1.proj_in") == "up_blocks.1.attentions.1.proj_in"
    assert set(map(layout.to_diffusers, shapes)) == set(unet_weights("SD1", (32, 64), (True, False)))


def broken(host, name, change):
    """The tiny checkpoint's file, changed."""
    source = host.folder("checkpoints") / "tiny.safetensors"
    path = host.folder("checkpoints") / name
    change(source, path)
    with pytest.raises(HostError) as raised:
        host.load_checkpoint(name)
    assert name in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def test_broken_files_are_named(host, loaded):
    def resaved(change):
        def write(source, path):
            state = weights(source)
            change(state)
            save_file(state, str(path))

        return write

    conv_out = "model.diffusion_model.out.2.weight"
    assert "truncated" in broken(host, "cut.safetensors", lambda s, p: p.write_bytes(s.read_bytes()[:100_000]))
    assert "truncated" in broken(host, "text.safetensors", lambda s, p: p.write_text("hello"))
    assert "a LoRA" in broken(
        host, "lora.safetensors", lambda s, p: save_file({"x.lora_down.weight": torch.zeros(1)}, str(p))
    )
    assert "incomplete" in broken(host, "missing.safetensors", resaved(lambda s: s.pop(conv_out)))
    assert "width 768 and a vector of 2816" in broken(
        host,
        "xl.safetensors",
        resaved(lambda s: s.update({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1, 2816)})),
    )


def test_nothing_is_unpickled(host, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    assert "cannot be read" in broken(host, "evil.ckpt", lambda s, p: torch.save({"state_dict": Evil()}, p))
    assert not (tmp_path / "evil").exists()


def test_a_ckpt_of_tensors_loads(host, loaded):
    state = weights(host.path("checkpoints", "tiny.safetensors"))
    torch.save({"state_dict": state, "epoch": 3}, host.folder("checkpoints") / "same.ckpt")
    model, clip, vae = host.load_checkpoint("same.ckpt")
    for same, original in zip((model, clip, vae), loaded, strict=True):
        assert host.fingerprint(same) == host.fingerprint(original)


# autoencoders


@pytest.mark.parametrize("kind", ["taesd", "kl"])
def test_autoencoders(host, kind):
    _, vae, _ = variant(host, f"{kind}.safetensors", vae=kind)
    image = torch.rand(2, 35, 24, 3, generator=torch.Generator().manual_seed(0))
    latent = host.encode_image(vae, image)
    assert latent.shape == (2, 4, 4, 3)
    assert torch.allclose(latent, host.encode_image(vae, image[:, 1:33]))
    decoded = host.decode_image(vae, latent)
    assert decoded.shape == (2, 32, 24, 3) and decoded.min() >= 0 and decoded.max() <= 1
    with pytest.raises(HostError, match="4x4"):
        host.encode_image(vae, image[:, :4, :4])


def test_tiny_autoencoder_knows_scale_and_shift(host, loaded):
    vae = loaded[2]
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    raw = vae.module.encoder(image.movedim(-1, 1) * 2 - 1)
    assert torch.allclose(host.encode_image(vae, image), raw / 0.18215 + 0.1, atol=1e-5)


def test_scale_and_shift_of_latents_tell_autoencoders_apart(host, loaded):
    """They are no weights of the network, but all latents depend on them; those that change nothing are in no key."""
    vae = loaded[2]
    assert host.fingerprint(vae).settings == {"scale of latents": "0.18215", "shift of latents": "0.1"}
    plain = variant(host, "kl_again.safetensors", vae="kl")[1]
    assert not host.fingerprint(plain).settings and host.fingerprint(plain) == digest(plain.module.state_dict())


def test_the_noise_schedule_tells_models_apart(host, loaded):
    """Training takes it from the model; the network is the same."""
    model = loaded[0]
    own = model.facts.schedule
    for schedule, same in ((own, True), (own.zero_terminal_snr(), False)):
        flow = FlowParameterization(Alignment(schedule, "v"))
        assert (host.fingerprint(host.as_flow(model, flow)) == host.fingerprint(model)) is same


# sampling


def test_schedules_end_at_zero_and_begin_at_the_terminal():
    levels = StockLevels(NoiseSchedule.scaled_linear(), "eps")
    for name in core_nodes.SCHEDULERS:
        sigmas = sigmas_for(levels, name, 6)
        assert len(sigmas) == (7 if name != "ddim_uniform" else 8) and sigmas[-1] == 0 and (sigmas.diff() < 0).all(), (
            name
        )
        assert sigmas[0] == pytest.approx(14.6146, rel=0.08), name
    assert len(sigmas_for(levels, "normal", 6, denoise=0.5)) == 7
    assert sigmas_for(levels, "normal", 6, denoise=0.5)[0] < 14
    assert len(sigmas_for(levels, "normal", 6, denoise=0.0)) == 0


def test_known_sigmas():
    """Karras' and the normal schedule of SD1 for 4 steps, from ComfyUI 0.3.64."""
    levels = StockLevels(NoiseSchedule.scaled_linear(), "eps")
    assert sigmas_for(levels, "karras", 4).tolist() == pytest.approx(
        [14.614643, 3.168605, 0.446919, 0.029167, 0.0], rel=2e-5
    )
    assert sigmas_for(levels, "normal", 4).tolist() == pytest.approx(
        [14.614640, 2.918307, 0.932358, 0.029167, 0.0], rel=2e-5
    )
    assert sigmas_for(levels, "beta", 4).tolist() == pytest.approx(
        [14.614641, 5.686592, 1.618278, 0.515391, 0.0], rel=2e-5
    )


def test_denoise_and_mask_keep_the_image(host, loaded, conditions):
    image = {"samples": torch.randn(1, 4, 8, 8)}
    assert torch.equal(sampled(host, loaded[0], conditions, latent=image, denoise=0.0), image["samples"])
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    out = sampled(host, loaded[0], conditions, latent={**image, "noise_mask": mask})
    assert torch.allclose(out[..., 4:], image["samples"][..., 4:], atol=1e-5)
    assert not torch.allclose(out[..., :3], image["samples"][..., :3], atol=1e-1)


def test_a_latent_of_another_kind_of_model_is_named(host, loaded, conditions):
    said = r"latent_image: it has 16 channels \(shape \(1, 16, 8, 8\)\), the SD1 model takes 4"
    with pytest.raises(HostError, match=said):
        sampled(host, loaded[0], conditions, latent={"samples": torch.ones(1, 16, 8, 8)})


def test_cfg_1_leaves_the_negative_out(host, loaded, conditions):
    positive, negative = conditions
    assert torch.equal(
        sampled(host, loaded[0], (positive, negative), cfg=1.0), sampled(host, loaded[0], (positive, positive), cfg=1.0)
    )


def test_contexts_of_different_length_meet(host, loaded):
    long = host.encode_text(loaded[1], "many words " * 50)
    short = host.encode_text(loaded[1], "few")
    assert long[0][0].shape[1] == 154
    assert torch.isfinite(sampled(host, loaded[0], (long, short), steps=1)).all()


def test_captions_of_different_length_are_trained_as_the_encoder_continues_them(loaded):
    """The oracle is the encoder itself, given the short caption's chunk and empty ones behind it."""
    clip = loaded[1]
    tower = clip.towers["l"]
    parts = [*prompts.chunks("few", tokenize, tower.kind.pad), *[prompts.empty_chunk(tower.kind.pad)] * 2]
    with torch.no_grad():
        expected = tower(torch.tensor([chunk.ids for chunk in parts]))[0].flatten(0, 1)
        context, _ = HeadlessText(clip).encode(["few", "many words " * 80, "word " * 100])
    assert context.shape[:2] == (3, 3 * 77)  # of 1, 3 and 2 chunks
    assert torch.allclose(context[0], expected, atol=1e-6)


def test_euler_on_the_flow_is_euler_in_sigma_k(host, loaded, conditions):
    """DESIGN trap 6, through both kinds of model, both samplers and the solver."""
    use(host)
    model, seed, cfg = loaded[0], 3, 2.0
    flow = FlowParameterization(Alignment(NoiseSchedule.scaled_linear(), "eps"))
    euler, solver = core_nodes.KSamplerSelect().select("euler")[0], host.solver("euler", 1e-3, 1e-4)
    runs = [
        host.sample(m, *conditions, LATENT, seed, sampler, sigmas, cfg)["samples"]
        for m, sigmas in ((model, flow.sigmas_k(3)), (host.as_flow(model, flow), flow.sigmas(3)))
        for sampler in (euler, solver)
    ]
    assert torch.allclose(runs[0], runs[1], atol=1e-4) and torch.allclose(runs[2], runs[3], atol=1e-4)
    assert torch.allclose(runs[0], runs[2], atol=0.02 * float(runs[0].std()))  # stock models round the timestep


def test_flow_models_work_in_the_ksampler(host, loaded, conditions):
    flow = FlowParameterization(Alignment(NoiseSchedule.scaled_linear(), "eps"), start="noise")
    patched = host.as_flow(loaded[0], flow)
    assert host.facts(patched).flow is flow and host.facts(loaded[0]).flow is None
    for scheduler in ("simple", "normal", "beta"):
        assert torch.isfinite(sampled(host, patched, conditions, scheduler=scheduler)).all(), scheduler


def test_foreign_conditioning_is_refused(host, loaded, conditions):
    positive = [[conditions[0][0][0], {"control": object()}]]
    with pytest.raises(HostError, match="control"):
        sampled(host, loaded[0], (positive, conditions[1]))
    with pytest.raises(HostError, match="shape"):
        sampled(host, loaded[0], conditions, latent={"samples": torch.zeros(1, 16, 8, 8)})


# LoRA


def lora(names, seed=0, rank=2, width=32):
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, (outputs, inputs, *size) in names.items():
        state[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, *size, generator=draw)
        state[f"{name}.lora_up.weight"] = torch.randn(outputs, rank, *[1] * len(size), generator=draw)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    return state


TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
FILE = {TO_Q: (32, 32), CONV: (32, 32, 3, 3), "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}


def test_a_lora_changes_what_it_names_and_nothing_stays(host, loaded, conditions):
    model, clip, _ = loaded
    before, prints = sampled(host, model, conditions), (host.fingerprint(model), host.fingerprint(clip))
    patched, patched_clip = host.apply_lora(model, clip, lora(FILE), 0.7, {"diff2flow.start": "noise"})
    assert not torch.allclose(sampled(host, patched, conditions), before)
    assert not torch.equal(host.encode_text(patched_clip, "a cat")[0][0], host.encode_text(clip, "a cat")[0][0])
    assert torch.equal(sampled(host, model, conditions), before)
    assert (host.fingerprint(model), host.fingerprint(clip)) == prints
    assert host.fingerprint(patched) != prints[0] and host.fingerprint(patched_clip) != prints[1]
    assert host.facts(patched).loras == ({"diff2flow.start": "noise"},) and host.facts(model).loras == ()


def test_merged_weights(host, loaded):
    state = lora(FILE) | {
        "lora_unet_conv_out.diff": torch.ones(4, 32, 3, 3),
        "lora_unet_conv_out.diff_b": torch.ones(4),
    }
    patched, _ = host.apply_lora(loaded[0], None, state, 0.5, None)
    merged, base = (
        dict(m.named_parameters())
        for m in (patched.base.weights.merged(patched.patches), loaded[0].base.weights.module)
    )
    down, up = state[f"{CONV}.lora_down.weight"], state[f"{CONV}.lora_up.weight"]
    delta = 0.5 * (1.0 / 2) * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    name = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.allclose(merged[name], base[name] + delta, atol=1e-5)
    for part, name in (("diff", "conv_out.weight"), ("diff_b", "conv_out.bias")):
        assert torch.allclose(merged[name], base[name] + 0.5 * state[f"lora_unet_conv_out.{part}"], atol=1e-6)
    assert patched.base.weights.merged(patched.patches) is patched.base.weights.merged(patched.patches)
    assert merged["conv_in.weight"].data_ptr() == base["conv_in.weight"].data_ptr()


def test_strength_0_changes_nothing_and_loras_stack(host, loaded, conditions):
    model = loaded[0]
    before = sampled(host, model, conditions)
    none, _ = host.apply_lora(model, None, lora(FILE), 0.0, {"a": "b"})
    assert torch.equal(sampled(host, none, conditions), before) and host.facts(none).loras == ()
    one, _ = host.apply_lora(model, None, lora({TO_Q: (32, 32)}), 0.5, None)
    back, _ = host.apply_lora(one, None, lora({TO_Q: (32, 32)}), -0.5, None)
    assert torch.allclose(sampled(host, back, conditions), before, atol=1e-3)


@pytest.mark.parametrize(
    "spelling",
    [
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    ],
)
def test_spellings_of_layer_names(host, loaded, spelling):
    state = lora({spelling: (32, 32)})
    if spelling.startswith("unet."):
        state = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in state.items()}
    patched, _ = host.apply_lora(loaded[0], None, state, 1.0, None)
    expected, _ = host.apply_lora(loaded[0], None, lora({TO_Q: (32, 32)}), 1.0, None)
    assert host.fingerprint(patched) == host.fingerprint(expected)


def test_loras_that_do_not_fit(host, loaded):
    model = loaded[0]
    with pytest.raises(HostError, match="SD1.*sd_v2"):
        host.apply_lora(model, None, lora({TO_Q: (64, 64)}), 1.0, {"ss_base_model_version": "sd_v2"})
    with pytest.raises(HostError, match="none of the LoRA's 1 layers"):
        host.apply_lora(model, None, lora({"lora_unet_input_blocks_9_1_x": (32, 32)}), 1.0, None)
    with pytest.raises(HostError, match="lacks lokr_w2"):
        host.apply_lora(model, None, {f"{TO_Q}.lokr_w1": torch.zeros(1)}, 1.0, None)


def test_a_lora_may_widen_the_first_convolution(host, loaded, conditions):
    wide = torch.cat([torch.zeros(32, 4, 3, 3), torch.ones(32, 4, 3, 3)], dim=1)
    state = {
        "lora_unet_conv_in.lora_up.weight": torch.eye(32)[..., None, None],
        "lora_unet_conv_in.lora_down.weight": wide,
        "lora_unet_conv_in.reshape_weight": torch.tensor([32, 8, 3, 3]),
    }
    patched, _ = host.apply_lora(loaded[0], None, state, 1.0, None)
    with_context = [
        [[c, {**more, "noise_concat": torch.ones(1, 4, 8, 8) * scale}] for c, more in conditions[0]]
        for scale in (0.0, 1.0)
    ]
    out = [sampled(host, patched, (side, side), cfg=1.0) for side in with_context]
    assert torch.allclose(out[0], sampled(host, loaded[0], conditions, cfg=1.0), atol=1e-3)
    assert not torch.allclose(out[1], out[0], atol=1e-1)
    narrow = {"lora_unet_conv_in.diff": torch.ones(32, 4, 3, 3)}
    with pytest.raises(HostError, match="a LoRA before it has widened that layer.*put this LoRA before that one"):
        host.apply_lora(patched, None, narrow, 1.0, None)
    both, _ = host.apply_lora(host.apply_lora(loaded[0], None, narrow, 1.0, None)[0], None, state, 1.0, None)
    assert both.base.weights.merged(both.patches).conv_in.weight.shape[1] == 8


# training


def test_training_leaves_the_model_alone(host, loaded, conditions):
    model = loaded[0]
    before = sampled(host, model, conditions)
    patched, _ = host.apply_lora(model, None, lora({TO_Q: (32, 32)}), 1.0, None)
    with torch.no_grad(), host.training(patched) as backbone:
        assert torch.is_grad_enabled() and not any(p.requires_grad for p in backbone.module.parameters())
        assert (backbone.family, backbone.prediction, backbone.base_name) == ("SD1", "eps", "tiny.safetensors")
        assert len(backbone.base_hash) == 64 and backbone.layer_names()["conv_in"] == "conv_in"
        merged = backbone.module.get_parameter("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight")
        assert not torch.equal(
            merged,
            model.base.weights.module.get_parameter(
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
            ),
        )
        backbone.module.conv_out = torch.nn.Conv2d(32, 4, 1)
        backbone.module.train().requires_grad_(True)
        x, tau = torch.randn(2, 4, 8, 8), torch.tensor([3.5, 998.0])
        out = backbone(x, tau, backbone.conditioning(conditions[0][0][0].repeat(2, 1, 1), None, torch.zeros(2, 6)))
        out.square().mean().backward()
        assert backbone.module.conv_in.weight.grad.abs().max() > 0
        assert torch.allclose(backbone.unscale_latent(backbone.scale_latent(x)), x, atol=1e-6)
    module = model.base.weights.module
    assert not module.training and not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert torch.equal(sampled(host, model, conditions), before)


# files


def test_names_and_paths(host, tmp_path):
    assert "tiny.safetensors" in host.names("checkpoints") and host.names("loras") == []
    (host.folder("datasets") / "cats" / "shards").mkdir(parents=True)
    assert host.names("datasets") == ["cats", "cats/shards"]
    linked = host.folder("loras") / "styles"
    linked.mkdir()
    (tmp_path / "real.safetensors").touch()
    (linked / "ink.safetensors").symlink_to(tmp_path / "real.safetensors")
    assert host.names("loras") == ["styles/ink.safetensors"]
    assert host.path("loras", "styles/ink.safetensors").exists()
    for kind, name in (("checkpoints", "../x"), ("input", "../x"), ("checkpoints", "tiny"), ("datasets", "dogs")):
        with pytest.raises(HostError):
            host.path(kind, name)
