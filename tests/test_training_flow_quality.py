"""How well a model follows a dataset's flow: perfect networks have no loss and straight paths, others do not."""

import dataclasses
import math

import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.alignment import Alignment, NaiveFlow
from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.tests.training_fakes import FakeHost, TinyBackbone, tiny_dataset
from diff2flow_nodes.training.flow_quality import flow_quality


class _Knowing(TinyBackbone):
    """Knows that all data is one latent: its eps is (x_diff - alpha x_data)/sigma, bent by `bend` of x_diff²."""

    def __init__(self, latent, bend=0.0):
        super().__init__("eps")
        self.x_data, self.bend = self.scale_latent(latent), bend

    def __call__(self, x_diff, tau, conditioning):
        alignment = Alignment(self.schedule, "eps")
        alpha, sigma = alignment.coefficients(alignment.flow_time(tau))
        alpha, sigma = (each.reshape(-1, 1, 1, 1).to(x_diff) for each in (alpha, sigma))
        return (x_diff - alpha * self.x_data) / sigma + self.bend * x_diff**2


@pytest.fixture
def same(tmp_path):
    """A dataset all of whose items are one latent."""
    dataset = tiny_dataset(tmp_path)
    first = dataset.items[0].latent
    return dataclasses.replace(dataset, items=tuple(dataclasses.replace(item, latent=first) for item in dataset.items))


@pytest.mark.parametrize("start", ["noise", "terminal"])
def test_a_network_that_knows_the_data_walks_straight(same, start):
    latent = same.batch([0]).latent
    backbone = _Knowing(latent)
    flow = FlowParameterization(Alignment(backbone.schedule, "eps"), start)
    found = flow_quality(backbone, same, flow, seed=3, steps=6)
    assert found.losses["loss"] < 1e-4 and len(found.losses) == 5
    if start == "terminal":  # before t_min the velocity is that of t_min: a path from t = 0 bends there
        assert found.paths.mean < 1e-3 * found.paths.speed
    bent = flow_quality(_Knowing(latent, 0.3), same, flow, seed=3, steps=6)
    assert bent.losses["loss"] > 0.01 and bent.paths.relative > 10 * found.paths.relative
    assert "flow matching loss" in bent.report() and f"straightness {bent.paths.mean:.4g}" in bent.report()


def test_a_network_that_predicts_the_velocity_is_asked_for_it(same):
    latent = same.batch([0]).latent
    backbone = _Knowing(latent)
    x_data = backbone.x_data
    naive = NaiveFlow(backbone.schedule)
    seen = []

    def velocity(x_flow, tau, conditioning):
        t = naive.flow_time(tau).reshape(-1, 1, 1, 1).to(x_flow)
        seen.append(float(t[0]))
        return (x_data - x_flow) / (1.0 - t).clamp(min=1e-6)

    backbone.__class__ = type("_Naive", (_Knowing,), {"__call__": lambda self, *given: velocity(*given)})
    found = flow_quality(backbone, same, FlowParameterization(naive, "noise"), seed=0, steps=4)
    assert found.losses["loss"] < 1e-6 and found.paths.relative < 1e-6
    assert min(seen) == 0.0


def test_the_noise_depends_on_the_seed(same):
    backbone = TinyBackbone()
    flow = FlowParameterization(Alignment(backbone.schedule, "eps"))
    one, again, other = (flow_quality(backbone, same, flow, seed, steps=2) for seed in (0, 0, 1))
    assert one.losses == again.losses and one.paths.mean == again.paths.mean
    assert one.losses != other.losses and one.paths.mean != other.paths.mean


@pytest.fixture
def node(tmp_path):
    before = list(hosts._chosen)
    hosts.use(FakeHost(tmp_path))
    yield NODE_CLASS_MAPPINGS["Diff2FlowEvaluate"]()
    hosts._chosen[:] = before


def test_the_node_judges_a_model_beside_its_images(node, same):
    pictures = torch.rand(6, 8, 8, 3)
    report, *numbers = node.evaluate(pictures, pictures, "pixels", model=TinyBackbone(), dataset=same, seed=5)
    straight, loss = numbers[-2:]
    assert f"flow matching loss {loss:.4g}" in report and f"straightness {straight:.4g}" in report
    assert math.isnan(numbers[-3])
    plain = node.evaluate(pictures, pictures, "pixels")
    assert all(math.isnan(value) for value in plain[-3:]) and "straightness" not in plain[0]


def test_half_of_what_belongs_together_is_refused(node, same):
    pictures = torch.rand(6, 8, 8, 3)
    with pytest.raises(HostError, match="Diff2Flow Evaluate: model is given without dataset: give dataset, too"):
        node.evaluate(pictures, pictures, "pixels", model=TinyBackbone())
    with pytest.raises(HostError, match="captions is given without clip_model"):
        node.evaluate(pictures, pictures, "pixels", captions="a fox")
    with pytest.raises(HostError, match="captions must have 1 line or 6, one for each of the samples, not 2"):
        node.evaluate(pictures, pictures, "pixels", captions="a fox\na cat", clip_model="clip")
    with pytest.raises(HostError, match="is not allowed: it must stay inside the folder"):
        node.evaluate(pictures, pictures, "pixels", captions="a fox", clip_model="../clip")
