"""Diff2Flow Export to Diffusers, headless: the folder loads by from_pretrained and gives the images of our sampler."""

import importlib.util
import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from diff2flow_nodes import hosts
from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.hosts import HostError, use
from diff2flow_nodes.hosts.choice import flow_of
from diff2flow_nodes.hosts.headless import HeadlessHost
from diff2flow_nodes.hosts.headless.pipeline_card import card
from diff2flow_nodes.hosts.headless.pipeline_folder import scheduler_of
from diff2flow_nodes.hosts.headless.sampling import seeded_noise
from diff2flow_nodes.hosts.headless.tokens import tokenize
from diff2flow_nodes.nodes.sampling import ATOL, RTOL, sampled
from diff2flow_nodes.nodes.sharing import Diff2FlowExportDiffusers
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint
from diff2flow_nodes.tests.share_loras import METADATA, random_lora

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other
PROMPT, NEGATIVE = "a red digit, on grey Paper", "blurred"
START_ERROR = 0.01
"""sigma_max instead of sqrt(1 + sigma_max²) where the scheduler starts: 0.2 %, and what becomes of it."""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("export"), list(hosts._chosen)
    made = HeadlessHost(place / "models", place / "input", place / "output")
    use(made)
    yield made
    hosts._chosen[:] = before


def made(host, family, vae="kl", **options):
    name = f"{family}_{vae}.safetensors"
    make_checkpoint(host.folder("checkpoints") / name, family, (32, 64), vae=vae, **options)
    return host.load_checkpoint(name)


def with_lora(host, loaded, **changes):
    model, clip, vae = loaded
    return *host.apply_lora(model, clip, random_lora(model, clip), 0.2, {**METADATA, **changes}), vae


def difference(image, ours):
    """Root mean square, as a part of the spread."""
    return float(((image - ours).square().mean() / ours.var()).sqrt())


def ours(host, model, clip, vae, steps, cfg):
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    conditions = host.encode_text(clip, PROMPT), host.encode_text(clip, NEGATIVE)
    solver = host.solver("euler", RTOL, ATOL)
    samples = sampled(model, *conditions, latent, 5, steps, cfg, solver, "auto")["samples"]
    return samples, host.decode_image(vae, samples)


def theirs(pipe, kind, **steps):
    noise = seeded_noise(torch.zeros(1, 4, 8, 8), 5, None)
    texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    return pipe(**texts, guidance_scale=3.0, width=64, height=64, latents=noise, output_type=kind, **steps).images


@pytest.mark.parametrize(("family", "vae"), [("SD1", "means"), ("SD2", "kl"), ("SDXL", "kl")])
def test_pipeline_gives_our_images(host, family, vae):
    """By the very same sigmas; and by itself in one step, where there is only one way."""
    model, clip, pixels = with_lora(host, made(host, family, vae))
    (folder,) = Diff2FlowExportDiffusers().export(model, clip, pixels, family, "fp32")["result"]
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == ("StableDiffusionXLPipeline" if family == "SDXL" else "StableDiffusionPipeline")
    sigmas = flow_of(model.facts).sigmas_k(3).tolist()
    latent, image = ours(host, model, clip, pixels, 3, 3.0)
    assert difference(theirs(pipe, "latent", sigmas=sigmas) / model.base.latent_scale, latent) < START_ERROR
    assert difference(theirs(pipe, "pt", sigmas=sigmas).movedim(1, -1), image) < 5 * START_ERROR
    alone = theirs(pipe, "latent", num_inference_steps=1) / model.base.latent_scale
    assert difference(alone, ours(host, model, clip, pixels, 1, 3.0)[0]) < START_ERROR
    plain = host.load_checkpoint(f"{family}_{vae}.safetensors")
    assert difference(ours(host, *plain, 3, 3.0)[0], latent) > 5 * START_ERROR, "the LoRA changes nothing"


def test_folder_says_how_it_is_sampled(host):
    shared = with_lora(host, made(host, "SD1", "means"), **{"diff2flow.start": "noise"})
    (folder,) = Diff2FlowExportDiffusers().export(*shared, "styles/ink")["result"]
    path = host.folder("output") / "diffusers" / "styles" / "ink"
    assert folder == str(path)
    page = (path / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=1)" in page and "with ink baked in" in page
    assert "trained to start at pure noise" in page and "torch.float16" in page and "64x64" in page
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.unet.config.sample_size == 8 and pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.unet.config.transformer_layers_per_block == 1 and pipe.unet.config.layers_per_block == 1
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert load_file(path / "text_encoder" / "model.safetensors").popitem()[1].dtype == torch.float16
    assert pipe.tokenizer(PROMPT).input_ids[1:-1] == tokenize(PROMPT)
    assert pipe.tokenizer.pad_token_id == pipe.tokenizer.eos_token_id and pipe.tokenizer.model_max_length == 77
    assert Diff2FlowExportDiffusers().export(*shared, "styles/ink")["result"][0].endswith("ink_00002")
    assert not [part for part in path.parent.iterdir() if part.name.startswith(".")]


def test_page_of_a_model_without_lora_recommends_nothing_special(host):
    (folder,) = Diff2FlowExportDiffusers().export(*made(host, "SD1", "means"), "plain")["result"]
    page = (host.folder("output") / "diffusers" / "plain" / "README.md").read_text()
    assert "Usual for a model as it is: 25 steps, guidance scale (CFG) 7." in page and "baked in" not in page


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_scheduler_steps_are_eulers_along_the_flow(prediction):
    """With a network of one line: a scheduler of another prediction or other steps would leave this path."""
    flow = FlowParameterization(Alignment(NoiseSchedule.scaled_linear(), prediction))
    scheduler = scheduler_of(flow)
    scheduler.set_timesteps(sigmas=flow.sigmas_k(5).tolist())
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 3, 3, generator=draw)
    x, times = noise * scheduler.init_noise_sigma, flow.times(5)
    x_flow = x * times[0]
    for number, tau in enumerate(scheduler.timesteps):
        x = scheduler.step(network(scheduler.scale_model_input(x, tau), tau), tau, x).prev_sample
        t = times[number].float()
        output = network(flow.alignment.to_diffusion(x_flow, t), flow.alignment.timestep(t))
        x_flow = x_flow + (times[number + 1] - times[number]) * flow.alignment.velocity(output, x_flow, t)
    torch.testing.assert_close(x, x_flow.float(), rtol=2e-3, atol=2e-3)


def test_a_schedule_that_ends_in_pure_noise_is_sampled_from_it():
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    flow = FlowParameterization(Alignment(schedule, "v"), "noise")
    scheduler = scheduler_of(flow)
    scheduler.set_timesteps(1)
    noise, tau = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)), scheduler.timesteps[0]
    x = noise * scheduler.init_noise_sigma
    image = scheduler.step(network(scheduler.scale_model_input(x, tau), tau), tau, x).prev_sample
    start = torch.tensor(1.0)
    output = network(flow.network_input(start, noise), flow.timestep(start))
    torch.testing.assert_close(image, flow.denoised(start, output, noise).float(), rtol=2e-3, atol=2e-3)
    page = card("x", "x", "SD1", flow, (), {}, 64, "float16")
    assert "zero terminal SNR" in page and "sigmas=" not in page


def network(x_diff, tau):
    return 0.3 * x_diff + 0.1 * torch.sin(torch.as_tensor(tau).float() / 300.0) + 0.2


def test_schedules_are_named_where_they_can_be():
    plain = NoiseSchedule.scaled_linear()
    config = scheduler_of(FlowParameterization(Alignment(plain, "eps"))).config
    assert config.beta_schedule == "scaled_linear" and not config.rescale_betas_zero_snr and not config.trained_betas
    assert config.prediction_type == "epsilon"
    config = scheduler_of(FlowParameterization(Alignment(plain.zero_terminal_snr(), "v"))).config
    assert config.rescale_betas_zero_snr and config.prediction_type == "v_prediction"
    cosine = NoiseSchedule.cosine()
    found = scheduler_of(FlowParameterization(Alignment(cosine, "v")))
    torch.testing.assert_close(found.alphas_cumprod.double(), cosine.alphas_cumprod, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diff2flow.objective": "flow_matching"}, "trained by plain flow matching"),
        ({"diff2flow.task": "depth"}, "makes the network look at an image"),
        ({"diff2flow.lora": json.dumps({"text_encoder": True})}, "clip: the LoRA 'ink' trained the text encoder"),
    ],
)
def test_what_cannot_be_exported_is_refused(host, changes, message):
    plain = made(host, "SD1", "means")
    model, _, vae = with_lora(host, plain, **changes)
    with pytest.raises(HostError, match=message) as refused:
        Diff2FlowExportDiffusers().export(model, plain[1], vae, "never")
    assert str(refused.value).startswith("Diff2Flow Export to Diffusers: ")
    assert not (host.folder("output") / "diffusers" / "never").exists()


def test_networks_that_pipelines_cannot_hold_are_refused(host):
    inpainting = made(host, "SD1", "none", in_channels=9)
    plain = made(host, "SD1", "taesd")
    with pytest.raises(HostError, match="takes 9 channels"):
        Diff2FlowExportDiffusers().export(inpainting[0], *plain[1:], "never")
    with pytest.raises(HostError, match="latents are shifted by 0.1"):
        Diff2FlowExportDiffusers().export(*plain, "never")
    exports = host.folder("output") / "diffusers"
    assert not exports.exists() or not [path for path in exports.iterdir() if "never" in path.name]


def test_a_missing_diffusers_is_named(host, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    with pytest.raises(HostError, match="the Python package diffusers is not installed.*pip install diffusers"):
        Diff2FlowExportDiffusers().export(None, None, None, "never")


@pytest.mark.parametrize("name", ["../outside", "/etc/x", ""])
def test_names_stay_in_the_folder(host, name):
    assert "name: the name" in str(Diff2FlowExportDiffusers.VALIDATE_INPUTS(name=name))
