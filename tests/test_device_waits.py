"""Nothing waits for the device inside a step: neither of training, nor of making pairs, nor of sampling.

Each is done twice on a pretended accelerator, for a few steps and for more: what is waited for once does not count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diff2flow_nodes import hosts
from diff2flow_nodes.hosts.headless import HeadlessHost, sampling
from diff2flow_nodes.samplers import SOLVERS
from diff2flow_nodes.tests.headless_fixtures import SDXL_TEXT, make_checkpoint
from diff2flow_nodes.tests.pretended_device import PretendedDevice
from diff2flow_nodes.tests.reflow_fakes import FLOW, make, maker
from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, tiny_dataset, tiny_job
from diff2flow_nodes.training.dataset import LatentDataset, pooled_key
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.layers import LoraSettings
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.reflow_settings import ReflowSettings
from diff2flow_nodes.training.settings import OptimizerSettings
from diff2flow_nodes.training.teacher import TeacherSettings
from diff2flow_nodes.training.transfer import to_device

PRECISION = OptimizerSettings(precision="fp32")
FAMILIES = ("SD1", "SDXL")


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


def steadily(device, work, few=1, many=3):
    """The waits of many steps that few steps have not."""
    found = []
    for steps in (few, many):
        device.waits.clear()
        with device.counted() as waits:
            work(steps)
        found.append(Counter(waits))
    return dict(found[1] - found[0])


def on(device, backbone):
    backbone.device = device.device
    device.place(backbone.module)
    return backbone


def trained(device, folder, dataset, backbone=None, **options):
    """Waits of training, a step that has been read included."""
    options = {"optimizer": PRECISION, "batch_size": 2, "keeping": {"memory_check": False}, **options}

    def train(steps):
        network = backbone() if backbone else on(device, TinyBackbone())
        job = tiny_job(folder / str(steps), network, dataset=dataset, steps=steps, **options)
        assert len(finetune(job, SilentProgress()).losses) == steps

    return steadily(device, train)


def complete(dataset: LatentDataset, pooled: int = 0) -> LatentDataset:
    """With masks, images that the network looks at, and pooled texts."""
    dataset.latents.add({f"mask{i}": torch.rand(1, 1, 4, 4) for i in range(len(dataset))})
    dataset.latents.add({f"seen{i}": torch.randn(1, 4, 4, 4) for i in range(len(dataset))})
    if pooled:
        captions = ["", *dataset.captions()]
        dataset.texts.add({pooled_key(caption): torch.randn(1, pooled) for caption in captions})
    items = tuple(replace(item, mask=f"mask{i}", image=f"seen{i}") for i, item in enumerate(dataset.items))
    dataset.latents.flush()
    dataset.texts.flush()
    return replace(dataset, items=items)


OBJECTIVES = {
    "diff2flow": ObjectiveSettings(caption_dropout=0.5),
    "weighted": ObjectiveSettings(weighting="eps", loss="pseudo_huber", time_distribution="logit_normal"),
    "transport": ObjectiveSettings(pairing="optimal_transport"),
    "flow_matching": ObjectiveSettings("flow_matching"),
    "diffusion": ObjectiveSettings("diffusion"),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_training_waits_for_nothing(device, tmp_path, objective):
    data = tiny_dataset(tmp_path / "data")
    assert trained(device, tmp_path, data, objective=OBJECTIVES[objective], batch_size=4) == {}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_averages_micro_batches_and_the_scaler_wait_for_nothing(device, tmp_path, precision):
    optimizer = OptimizerSettings(precision=precision, accumulation=2, ema=0.9)
    assert trained(device, tmp_path, tiny_dataset(tmp_path / "data"), optimizer=optimizer, batch_size=4) == {}


REFLOW = {
    "pairs": ReflowSettings(),
    "consistent": ReflowSettings(consistency=1.0),
    "windows": ReflowSettings(windows=2, window_steps=2, teacher_cfg=2.0),
}


@pytest.mark.parametrize("reflow", REFLOW)
def test_a_step_of_reflow_waits_for_nothing(device, tmp_path, reflow):
    pairs = make(tmp_path / "pairs", 6)
    assert trained(device, tmp_path, pairs, objective=ObjectiveSettings(reflow=REFLOW[reflow])) == {}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("waits")
    folder, two_levels = place / "models/checkpoints", {"channels": (32, 64), "attended": (False, True)}
    make_checkpoint(folder / "SD1.safetensors", "SD1", text=False, vae="none")
    make_checkpoint(folder / "SDXL.safetensors", "SDXL", vae="none", **two_levels)
    return place


@pytest.fixture
def host(models, device):
    before = list(hosts._chosen)
    made = HeadlessHost(models / "models", models / "input", models / "output", "cuda")
    hosts.use(made)
    yield made
    hosts._chosen[:] = before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_network_with_all_that_it_is_given_waits_for_nothing(device, host, tmp_path, family):
    """Context, masks and the image that is looked at; SDXL also pooled texts and sizes."""
    model, _, _ = host.load_checkpoint(f"{family}.safetensors")
    data = complete(tiny_dataset(tmp_path / "data", width=model.base.layout.context_width), SDXL_TEXT[1])
    lora = LoraSettings(rank=4, alpha=4.0, ends_in_full=True)
    with host.training(model) as backbone:
        assert trained(device, tmp_path, data, lambda: backbone, lora=lora) == {}


def test_a_step_with_the_text_encoders_waits_for_nothing(device, host, tmp_path):
    model, clip, _ = host.load_checkpoint("SDXL.safetensors")
    data = tiny_dataset(tmp_path / "data", width=model.base.layout.context_width)
    lora = LoraSettings(rank=4, alpha=4.0, text_encoder=True)
    with host.training(model, clip) as backbone:
        assert trained(device, tmp_path, data, lambda: backbone, lora=lora) == {}


def guessed(model, pooled=SDXL_TEXT[1]):
    """CONDITIONING without a text encoder."""
    return [[torch.randn(1, 77, model.base.layout.context_width), {"pooled_output": torch.randn(1, pooled)}]]


FIXED = [solver for solver in SOLVERS if solver != "dopri5"]
"""dopri5 looks at the error of each of its inner steps before it goes on."""


EACH = [*(("SD1", solver) for solver in FIXED), ("SDXL", "euler")]


@pytest.mark.parametrize(("family", "solver"), [*EACH, ("SD1", "k-diffusion's euler")])
def test_a_step_of_sampling_waits_for_nothing(device, host, family, solver):
    """Neither in flow time, as Diff2Flow Sampler walks, nor in a stock model's sigma_k, there with a mask."""
    model, _, _ = host.load_checkpoint(f"{family}.safetensors")
    sampler = sampling.solver(solver, 1e-4, 1e-4) if solver in FIXED else sampling.Sampler(sampling.euler, {})
    latent, texts = {"samples": torch.zeros(2, 4, 8, 8)}, (guessed(model), guessed(model))

    def sample(steps):
        host.sample(host.as_flow(model, FLOW), *texts, latent, 0, sampler, FLOW.sigmas(steps), 3.0)
        masked = {**latent, "noise_mask": torch.ones(1, 8, 8)}
        host.sample(model, *texts, masked, 0, sampler, FLOW.sigmas_k(steps), 3.0)

    assert steadily(device, sample) == {}


@pytest.mark.parametrize(("family", "solver"), EACH)
def test_an_evaluation_in_the_making_of_pairs_waits_for_nothing(device, host, tmp_path, family, solver):
    model, _, _ = host.load_checkpoint(f"{family}.safetensors")
    context, options = guessed(model)[0]

    def pairs(steps):
        teacher = TeacherSettings(steps, 2.0, solver)
        with host.training(model) as backbone:
            by = maker(backbone, encode=lambda caption: (context, options["pooled_output"]))
            assert len(make(tmp_path / f"{family}{solver}{steps}", 4, by=by, teacher=teacher, batch_size=2)) == 4

    assert steadily(device, pairs) == {}


def test_what_is_sent_is_what_was_there(device):
    """Also where rows are one row repeated, which cannot be pinned as they stand, and where a gradient comes back."""
    rows, weight = torch.arange(6).expand(3, -1), torch.randn(2, 3, requires_grad=True)
    with device.counted() as waits:
        there, known = to_device(rows, device.device), to_device(torch.ones(2, device=device.device), device.device)
    assert waits == {} and there.device == known.device == device.device and torch.equal(there.cpu(), rows)
    to_device(weight, device.device).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 3))


def test_an_estimate_needs_no_pinned_memory(device):
    """It sends tensors that hold nothing, which cannot be pinned: the estimate would be lost."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert to_device(torch.ones(2), device.device).shape == (2,)
