"""Everything runs on a device without float64, and comes out as on the CPU as far as float32 goes."""

from __future__ import annotations

import math

import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.alignment import Alignment, NaiveFlow, NoiseSchedule
from diff2flow_nodes.depth import codec
from diff2flow_nodes.depth.ensemble import flicker, merged
from diff2flow_nodes.depth.layouts import distance_to_planar
from diff2flow_nodes.depth.metrics import depth_metrics, fitted
from diff2flow_nodes.depth.sockets import depth_of
from diff2flow_nodes.hosts.headless import HeadlessHost
from diff2flow_nodes.metrics.evaluation import evaluated
from diff2flow_nodes.nodes import (
    NODE_CLASS_MAPPINGS,
    Diff2FlowModel,
    Diff2FlowSampler,
    Diff2FlowSigmas,
    Diff2FlowStepsGrid,
    Diff2FlowStraightness,
)
from diff2flow_nodes.samplers import SOLVERS
from diff2flow_nodes.samplers.straightness import straightness
from diff2flow_nodes.tests.headless_fixtures import SDXL_TEXT, make_checkpoint
from diff2flow_nodes.tests.pretended_device import PretendedDevice
from diff2flow_nodes.tests.reflow_fakes import FLOW, make, maker
from diff2flow_nodes.training.flow_quality import flow_quality
from diff2flow_nodes.training.times import DISTRIBUTIONS, drawn
from diff2flow_nodes.training.transport import transported

LATENTS = {"samples": torch.zeros(2, 4, 8, 8)}


@pytest.fixture
def device():
    with PretendedDevice("mps", float64=False) as pretended:
        yield pretended


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("narrow")
    tiny = {"channels": (32, 64), "attended": (False, True), "vae": "means"}
    make_checkpoint(root / "models/checkpoints/tiny.safetensors", "SDXL", **tiny)
    return root


@pytest.fixture
def loaded(place, device):
    """The host, MODEL, CLIP and VAE on the device."""
    before = list(hosts._chosen)
    host = HeadlessHost(place / "models", place / "input", place / "output", "mps")
    hosts.use(host)
    yield host, *host.load_checkpoint("tiny.safetensors")
    hosts._chosen[:] = before


@pytest.fixture(scope="module")
def on_cpu(place):
    """The same on the CPU."""
    host = HeadlessHost(place / "models", place / "input", place / "output")
    return host, *host.load_checkpoint("tiny.safetensors")


def spoken(width=sum(SDXL_TEXT)):
    """CONDITIONING, positive and negative, the same at every call."""
    draw = torch.Generator().manual_seed(1)
    sides = (torch.randn(1, 77, width, generator=draw) for _ in range(2))
    return [[[side, {"pooled_output": torch.randn(1, SDXL_TEXT[1], generator=draw)}]] for side in sides]


def node(name, **inputs):
    made = NODE_CLASS_MAPPINGS[name]()
    returned = getattr(made, made.FUNCTION)(**inputs)
    return returned["result"] if isinstance(returned, dict) else returned


def sampled(host, model, solver):
    hosts.use(host)
    return Diff2FlowSampler().sample(model, *spoken(), LATENTS, 0, 2, 1.0, solver, 1.0, "auto")[0]["samples"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_sampler_draws_what_it_draws_on_the_cpu(loaded, on_cpu, solver):
    torch.testing.assert_close(sampled(*loaded[:2], solver), sampled(*on_cpu[:2], solver), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("flow", [True, False])
def test_solver_and_sigmas_do_in_flow_time_and_in_a_stock_models_levels(loaded, on_cpu, flow):
    found = []
    for host, model, *_ in (loaded, on_cpu):
        hosts.use(host)
        if flow:
            [model] = Diff2FlowModel().patch(model, "auto", "auto", "auto", 1.0)
        assert host.facts(model).family == "SDXL"
        [sigmas] = Diff2FlowSigmas().build(model, 2, "uniform", 1.0)
        [sampler] = node("Diff2FlowSolver", solver="midpoint", rtol=1e-3, atol=1e-3)
        found.append(host.sample(model, *spoken(), LATENTS, 0, sampler, sigmas, 3.0)["samples"])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_straightness_and_the_steps_grid_do(loaded, on_cpu):
    found = []
    for host, model, _, vae in (loaded, on_cpu):
        hosts.use(host)
        mean, *_, ends = Diff2FlowStraightness().measure(model, *spoken(), LATENTS, 0, 3.0, 3)
        [grid] = Diff2FlowStepsGrid().draw(model, *spoken(), LATENTS, 0, 3.0, vae, "1, 2")
        found.append((torch.tensor(mean), ends["samples"], grid))
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(there, here, atol=5e-3, rtol=1e-3)


def test_a_dataset_is_made_and_trained_on_with_validation_and_samples(loaded):
    host, model, clip, vae = loaded
    images = torch.rand(4, 64, 64, 3)
    [data, *_] = node("Diff2FlowImages", images=images, vae=vae, clip=clip, captions="a cat\na dog\na fox\na bird")
    [lora] = node("Diff2FlowLoraConfig", preset="light", rank=4, alpha=4.0)
    watch = {"prompts": "a cat", "sample_every": 2, "sample_steps": "1", "cfg": 3.0, "width": 64, "height": 64}
    [watched] = node(
        "Diff2FlowTrainWatch", vae=vae, clip=clip, seed=0, validate_every=2, held_out_share=0.3, **watch
    )
    run = {"steps": 2, "batch_size": 2, "learning_rate": 1e-4, "seed": 0, "resume": "new", "memory_check": False}
    trained, name, *_ = node(
        "Diff2FlowTrain", model=model, dataset=data, lora=lora, objective="diff2flow", output_name="narrow",
        watch=watched, clip=clip, **run,
    )  # fmt: skip
    assert name and host.facts(trained).loras[0]["diff2flow.objective"] == "diff2flow"


def test_pairs_are_made_and_a_flow_is_judged_on_them(loaded, tmp_path):
    host, model, *_ = loaded
    context, options = spoken()[0][0]
    with host.training(model) as backbone:
        by = maker(backbone, encode=lambda caption: (context, options["pooled_output"]))
        pairs = make(tmp_path / "pairs", 4, by=by, batch_size=2)
        found = flow_quality(backbone, pairs, FLOW, 0, steps=2)
    assert len(pairs) == 4 and math.isfinite(found.losses["loss"]) and found.paths.mean > 0


def test_images_are_evaluated(device):
    sets = [torch.rand(12, 32, 32, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    there = evaluated(*(images.to(device.device) for images in sets), "pixels", None)
    assert there == evaluated(*sets, "pixels", None)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_times_are_drawn(device, name):
    u = torch.rand(64)
    there = drawn(name, u.to(device.device), 0.3, 0.8)
    assert there.device == device.device
    torch.testing.assert_close(there.cpu(), drawn(name, u, 0.3, 0.8))


def test_noises_are_paired(device):
    x_data, x_noise = torch.randn(6, 4, 2, 2), torch.randn(6, 4, 2, 2)
    there = transported(x_data.to(device.device), x_noise.to(device.device))
    assert there.device == device.device and torch.equal(there.cpu(), transported(x_data, x_noise))


@pytest.mark.parametrize("kind", ["vp", "ve", "naive"])
def test_the_maps_do(device, kind):
    schedule = NoiseSchedule.scaled_linear()
    if kind == "ve":
        schedule = NoiseSchedule.from_sigmas([0.01 * 1.01**i for i in range(800)])
    maps = NaiveFlow(schedule) if kind == "naive" else Alignment(schedule)
    x = torch.randn(3, 4, 2, 2)
    for t in (torch.tensor([0.1, 0.5, 0.9]), torch.tensor(0.3), torch.tensor([0, 1, 1])):
        there, moved = t.to(device.device), x.to(device.device)
        assert maps.timestep(there).device == device.device
        torch.testing.assert_close(maps.timestep(there).cpu(), maps.timestep(t), atol=0.5, rtol=1e-3, check_dtype=False)
        torch.testing.assert_close(maps.to_diffusion(moved, there).cpu(), maps.to_diffusion(x, t))
        torch.testing.assert_close(maps.velocity(moved, moved * 2, there).cpu(), maps.velocity(x, x * 2, t))
        for one, other in zip(maps.coefficients(there), maps.coefficients(t), strict=True):
            torch.testing.assert_close(one.cpu(), other, check_dtype=False)


def depths():
    """Truth in metres with a hole, and a prediction that is right up to scale and shift in its logarithm."""
    truth = torch.rand(2, 8, 8) * 5 + 1
    truth[0, 0, 0] = float("nan")
    return truth, truth.nan_to_num(1.0).log() * 0.3 + 0.1 + torch.rand(2, 8, 8) * 0.01


def test_depth_becomes_a_picture_and_is_measured(device):
    truth, prediction = depths()
    valid = codec.valid_pixels(truth)
    away = [tensor.to(device.device) for tensor in (truth, prediction, valid)]
    there, here = codec.encode(away[0], away[2]), codec.encode(truth, valid)
    assert there.picture.device == device.device
    torch.testing.assert_close(there.picture.cpu(), here.picture)
    back = codec.decode(*there)
    assert back.device == device.device
    torch.testing.assert_close(back.cpu(), codec.decode(*here))
    for space in ("log", "depth", "disparity"):
        fit = fitted(away[1], away[0], away[2], space)
        torch.testing.assert_close(fit.cpu(), fitted(prediction, truth, valid, space))
    assert depth_metrics(away[1].exp(), away[0]) == pytest.approx(depth_metrics(prediction.exp(), truth), rel=1e-5)
    planar = distance_to_planar(away[0], 9.0)
    assert planar.device == device.device
    torch.testing.assert_close(planar.cpu(), distance_to_planar(truth, 9.0), equal_nan=True)
    image = prediction[..., None].repeat(1, 1, 1, 3)
    assert torch.equal(depth_of(image.to(device.device), "depth").cpu(), prediction)
    with pytest.raises(ValueError, match="colour picture"):
        depth_of((image * torch.tensor([1.0, 2.0, 3.0])).to(device.device), "depth")


@pytest.mark.parametrize("reduction", ["median", "mean"])
def test_estimates_are_merged(device, reduction):
    """One of them is constant, which float32 would take for a depth of rounding errors."""
    _, prediction = depths()
    members = torch.stack([prediction, 2 * prediction + 0.1, torch.full_like(prediction, 0.7)])
    there, here = merged(members.to(device.device), reduction), merged(members, reduction)
    for one, other in zip(there, here, strict=True):
        assert one.device == device.device and torch.equal(one.cpu(), other)
    assert flicker(prediction.to(device.device)) == flicker(prediction)


def test_paths_are_measured_on_the_device(device):
    velocities, times = torch.randn(3, 2, 4), torch.tensor([0.0, 0.3, 0.6])
    lengths = torch.tensor([0.3, 0.3, 0.4])
    there = straightness(*(tensor.to(device.device) for tensor in (velocities, times, lengths)))
    assert there.mean == pytest.approx(straightness(velocities, times, lengths).mean, rel=1e-5)
