"""Which noise goes to which item: transport is optimal, only reorders, goes on to the bit, and says its limits."""

import sys
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from diff2flow_nodes.nodes import Diff2FlowLossConfig
from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, tiny_dataset, tiny_job
from diff2flow_nodes.training import draws
from diff2flow_nodes.training.adapters import trainable
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.fit import require_suited
from diff2flow_nodes.training.layers import LoraSettings
from diff2flow_nodes.training.loop import Loop
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.parallel import Processes
from diff2flow_nodes.training.run_folder import open_run
from diff2flow_nodes.training.settings import OptimizerSettings, TrainSettings
from diff2flow_nodes.training.transport import transported

TRANSPORT = ObjectiveSettings(pairing="optimal_transport")


def _pair(count=6):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, 2, 2, generator=draw), torch.randn(count, 4, 2, 2, generator=draw)


def _cost(x_data, x_noise):
    return float((x_data - x_noise).square().sum())


def test_no_other_order_is_cheaper():
    x_data, x_noise = _pair()
    best = min(_cost(x_data, x_noise[list(order)]) for order in permutations(range(len(x_data))))
    found = transported(x_data, x_noise)
    assert _cost(x_data, found) == pytest.approx(best, rel=1e-6) and best < 0.95 * _cost(x_data, x_noise)
    torch.testing.assert_close(transported(0.1 * x_data + 3.0, x_noise), found, rtol=0, atol=0)


def test_noises_are_only_reordered():
    x_data, x_noise = _pair(16)
    found = transported(x_data, x_noise)
    assert found.dtype == x_noise.dtype and not torch.equal(found, x_noise)
    assert sorted(found.flatten(1).tolist()) == sorted(x_noise.flatten(1).tolist())
    assert torch.equal(transported(x_noise, x_noise), x_noise)


def test_without_scipy_there_is_a_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match="needs the package 'scipy'.*or choose pairing 'independent'"):
        transported(*_pair())


def _micro_batches(folder, objective, processes=None, accumulation=1):
    settings = TrainSettings(5, 8, seed=4, objective=objective, optimizer=OptimizerSettings(accumulation=accumulation))
    backbone = TinyBackbone()
    with trainable(backbone, LoraSettings(rank=2), 0) as adapters:
        loop = Loop(backbone, tiny_dataset(folder, count=8), adapters, settings, processes or Processes())
        return [loop.micro_batch(list(range(8)), 2, micro) for micro in range(accumulation)]


def test_a_batch_is_the_same_but_for_the_order_of_its_noises(tmp_path):
    [plain] = _micro_batches(tmp_path / "a", ObjectiveSettings())
    [paired] = _micro_batches(tmp_path / "b", replace(TRANSPORT, name="flow_matching"))
    assert torch.equal(plain.t.argsort(), paired.t.argsort()) and torch.equal(plain.batch.latent, paired.batch.latent)
    assert torch.equal(plain.x_noise, draws.noise(plain.x_noise.shape, 4, 2))
    assert torch.equal(paired.x_noise, transported(0.5 * paired.batch.latent, plain.x_noise))
    assert not torch.equal(paired.x_noise, plain.x_noise)


def test_each_process_and_each_network_call_pairs_its_own_part(tmp_path):
    [plain] = _micro_batches(tmp_path / "a", ObjectiveSettings())
    first, second = _micro_batches(tmp_path / "b", TRANSPORT, accumulation=2)
    [other] = _micro_batches(tmp_path / "c", TRANSPORT, Processes(1, 2))
    for part, found in ((slice(0, 4), first), (slice(4, 8), second), (slice(4, 8), other)):
        assert torch.equal(found.x_noise, transported(plain.batch.latent[part], plain.x_noise[part]))


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_stops_goes_on_to_the_bit(tmp_path, stop):
    options = {"steps": 6, "objective": TRANSPORT, "optimizer": OptimizerSettings(accumulation=2, ema=0.5)}
    whole = finetune(tiny_job(tmp_path / "whole", **options), SilentProgress())
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_job(tmp_path / "halved", **options), SilentProgress(stop, KeyboardInterrupt()))
    resumed = finetune(tiny_job(tmp_path / "halved", **options), SilentProgress())
    assert whole.losses == resumed.losses
    assert all(torch.equal(whole.state[key], resumed.state[key]) for key in whole.state)
    assert resumed.metadata["diff2flow.pairing"] == "optimal_transport"
    plain = finetune(tiny_job(tmp_path / "plain", **{**options, "objective": ObjectiveSettings()}), SilentProgress())
    assert plain.losses != whole.losses and plain.metadata["diff2flow.pairing"] == "independent"


def test_runs_from_before_the_choice_go_on(tmp_path):
    identity = tiny_job(tmp_path).identity()
    assert "pairing" not in identity["settings"]["objective"]
    other = tiny_job(tmp_path, objective=TRANSPORT).identity()
    assert other["settings"]["objective"].pop("pairing") == "optimal_transport" and other == identity
    run = open_run(tmp_path / "runs", "style", identity, "auto")
    other = tiny_job(tmp_path, objective=TRANSPORT).identity()
    assert open_run(tmp_path / "runs", "style", other, "auto").path != run.path


def test_the_node_hands_the_choice_on_as_its_last_input():
    [settings] = Diff2FlowLossConfig().build(pairing="optimal_transport")
    assert settings == TRANSPORT and Diff2FlowLossConfig().build()[0] == ObjectiveSettings()
    assert list(Diff2FlowLossConfig.INPUT_TYPES()["optional"])[-1] == "pairing"
    with pytest.raises(ValueError, match="Loss Config: pairing must be one of independent, optimal_transport, not 'x'"):
        Diff2FlowLossConfig().build(pairing="x")


def test_what_has_no_free_noise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="objective 'diffusion' cannot be combined with pairing 'optimal_transport'"):
        replace(TRANSPORT, name="diffusion")
    pairs = SimpleNamespace(name="round1", has_noise=True, image_channels=0)
    with pytest.raises(ValueError, match="cannot be combined with 'round1', whose pairs have their own noise"):
        require_suited(TRANSPORT, pairs, LoraSettings())
    require_suited(ObjectiveSettings(), pairs, LoraSettings())


@pytest.mark.parametrize(("size", "parts", "needed"), [(1, 1, 2), (4, 4, 8)])
def test_a_batch_of_one_is_refused(tmp_path, size, parts, needed):
    options = {"batch_size": size, "optimizer": OptimizerSettings(accumulation=parts), "objective": TRANSPORT}
    with pytest.raises(ValueError, match=rf"has 1 item \(batch_size {size}\); raise batch_size to at least {needed}"):
        finetune(tiny_job(tmp_path, **options), SilentProgress())
