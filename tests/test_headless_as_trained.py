"""Headless, a model is sampled as its LoRAs and its checkpoint were trained, whatever loaded them in which order."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from diff2flow_nodes import hosts
from diff2flow_nodes.alignment import NaiveFlow, NoiseSchedule
from diff2flow_nodes.hosts import choice, use
from diff2flow_nodes.hosts.headless import HeadlessHost, core_nodes
from diff2flow_nodes.nodes.loading import Diff2FlowCheckpointLoader, Diff2FlowLoraLoader
from diff2flow_nodes.nodes.sampling import Diff2FlowModel, Diff2FlowSampler, Diff2FlowSigmas
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint
from diff2flow_nodes.tests.share_loras import METADATA, random_lora

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other
AUTO = ("auto", "auto", "auto", 1.0)
MARKERS = {"eps": (), "v": ("v_pred",), "vz": ("v_pred", "ztsnr"), "z": ("ztsnr",)}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("trained"), list(hosts._chosen)
    made = HeadlessHost(place / "models", place / "input", place / "output")
    for name, markers in MARKERS.items():
        make_checkpoint(made.folder("checkpoints") / f"{name}.safetensors", markers=markers)
    use(made)
    model = made.load_checkpoint("eps.safetensors")[0]
    says = {
        "noise": {**METADATA, "diff2flow.start": "noise"},
        "naive": {**METADATA, "diff2flow.objective": "flow_matching", "diff2flow.start": "noise"},
        "vee": {**METADATA, "diff2flow.prediction": "v", "diff2flow.base_name": "eps.safetensors"},
        "kohya": {"ss_network_dim": "2"},
    }
    for name, metadata in says.items():
        save_file(random_lora(model), made.folder("loras") / f"{name}.safetensors", metadata)
    yield made
    hosts._chosen[:] = before


@pytest.fixture(scope="module")
def parts(host):
    return host.load_checkpoint("eps.safetensors")


def by_diff2flow(model, name, strength=0.1):
    return Diff2FlowLoraLoader().load(model, f"{name}.safetensors", strength)[0]


def by_model_only(model, name, strength=0.1):
    return core_nodes.LoraLoaderModelOnly().load_model(model, f"{name}.safetensors", strength)[0]


def by_lora_loader(model, name, strength=0.1):
    return core_nodes.LoraLoader().load(model, None, f"{name}.safetensors", strength, strength)[0]


LOADERS = (by_diff2flow, by_model_only, by_lora_loader)


def flow_model(model):
    return Diff2FlowModel().patch(model, *AUTO)[0]


def drawn(host, parts, model, sampler):
    text = host.encode_text(parts[1], "a cat")
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    if sampler == "KSampler":
        node = core_nodes.KSampler()
        return node.sample(model, 7, 3, 2.0, "euler", "simple", text, text, empty, 1.0)[0]["samples"]
    return Diff2FlowSampler().sample(model, text, text, empty, 7, 3, 2.0, "euler", 1.0, "auto")[0]["samples"]


@pytest.mark.parametrize("name", ["noise", "naive"])
@pytest.mark.parametrize("sampler", ["KSampler", "Diff2FlowSampler"])
def test_a_lora_behind_diff2flow_model_is_one_in_front(host, parts, name, sampler):
    model = parts[0]
    wanted = drawn(host, parts, flow_model(by_diff2flow(model, name)), sampler)
    for load in LOADERS:
        flow = host.facts(load(load(flow_model(model), name), "kohya")).flow
        assert flow.start == "noise" and isinstance(flow.alignment, NaiveFlow) == (name == "naive")
        assert torch.equal(drawn(host, parts, load(flow_model(model), name), sampler), wanted), load
        assert torch.equal(drawn(host, parts, flow_model(load(model, name)), sampler), wanted), load


def test_a_lora_at_strength_0_changes_no_start(host, parts):
    for load in LOADERS:
        assert host.facts(load(flow_model(parts[0]), "noise", 0.0)).flow.start == "terminal"


@pytest.mark.parametrize("name", MARKERS)
def test_a_marked_checkpoint_is_the_same_by_every_loader(host, caplog, name):
    file = f"{name}.safetensors"
    wanted = ("v" if name in ("v", "vz") else "eps", name == "vz")
    for model in (
        Diff2FlowCheckpointLoader().load(file, "None", 1.0)[0],
        core_nodes.CheckpointLoaderSimple().load(file)[0],
    ):
        facts = host.facts(model)
        assert (facts.prediction, facts.schedule.is_zero_terminal_snr) == wanted
    told = [record.message for record in caplog.records if "Diff2Flow Checkpoint Loader" in record.message]
    assert len(told) == (wanted[0] == "v") and all(file in each for each in told)


def test_zero_terminal_snr_is_sampled_by_every_way(host, caplog):
    parts = host.load_checkpoint("vz.safetensors")
    model, text = parts[0], host.encode_text(parts[1], "a cat")
    assert host.facts(model).schedule == NoiseSchedule.scaled_linear().zero_terminal_snr()
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    ours = drawn(host, parts, model, "Diff2FlowSampler")
    assert torch.equal(ours, drawn(host, parts, flow_model(model), "Diff2FlowSampler"))
    [sigmas] = Diff2FlowSigmas().build(model, 3, "uniform", 1.0)
    [euler] = core_nodes.KSamplerSelect().select("euler")
    stock = core_nodes.SamplerCustom().sample(model, True, 7, 2.0, text, text, euler, sigmas, empty)[0]["samples"]
    assert torch.isfinite(stock).all() and (stock - ours).norm() / ours.norm() < 0.1


def test_a_v_lora_on_its_own_base_makes_it_v(host, parts, caplog):
    choice.say_once.cache_clear()
    for load in LOADERS:
        assert host.facts(load(parts[0], "vee")).prediction == "v"
        assert host.facts(load(flow_model(parts[0]), "vee")).flow.alignment.prediction == "v"
    other = host.load_checkpoint("z.safetensors")[0]
    assert host.facts(by_model_only(other, "vee")).prediction == "eps"
    told = [record.message for record in caplog.records if "was trained on a v model" in record.message]
    assert len(told) == 1 and "eps.safetensors" in told[0]
