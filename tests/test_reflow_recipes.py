"""Recipes in training: the teacher of windows is the network as it was, consistency resumes to the bit, pairs drop."""

import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.nodes import Diff2FlowLoraConfig, Diff2FlowReflowPairs, Diff2FlowReflowRecipe, Diff2FlowTrain
from diff2flow_nodes.tests.reflow_fakes import make
from diff2flow_nodes.tests.training_fakes import FakeHost, SilentProgress, TinyBackbone, tiny_dataset, tiny_job
from diff2flow_nodes.training import pair_distances
from diff2flow_nodes.training.adapters import trainable
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.layers import LoraSettings
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.pair_distances import without_worst
from diff2flow_nodes.training.reflow_settings import ReflowSettings

UNCHECKED = {"memory_check": False}


def _objective(**reflow):
    return ObjectiveSettings(t_range="clamped", weighting="eps", reflow=ReflowSettings(**reflow))


@pytest.fixture
def pairs(tmp_path):
    return make(tmp_path / "pairs", 6, dtype="fp32", seed=5)


@pytest.fixture
def host(tmp_path):
    host, before = FakeHost(tmp_path), list(hosts._chosen)
    hosts.use(host)
    yield host
    hosts._chosen[:] = before


@pytest.mark.parametrize("dora", [False, True])
def test_switched_off_the_network_computes_what_it_did(dora):
    backbone = TinyBackbone()
    given = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 900.0]), {"context": torch.randn(2, 3, 6)}
    before = backbone(*given)
    with trainable(backbone, LoraSettings(rank=4, dora=dora, ends_in_full=True), 0) as adapters:
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.add_(0.1)
        changed = backbone(*given)
        with adapters.switched_off():
            assert torch.equal(backbone(*given), before)
        assert torch.equal(backbone(*given), changed) and not torch.allclose(changed, before, atol=1e-3)
        assert all(parameter.requires_grad for parameter in adapters.parameters())


def test_windows_call_the_teacher_as_it_was_on_images_and_pairs(tmp_path, pairs):
    """Each step: the teacher's steps with and without text, on the network without its LoRA; then the network."""

    class Watched(TinyBackbone):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __call__(self, x_diff, tau, conditioning):
            output = super().__call__(x_diff, tau, conditioning)
            if not isinstance(output, torch._subclasses.FakeTensor):
                self.calls.append((x_diff.detach(), tau, conditioning["context"], output))
            return output

    for dataset in (tiny_dataset(tmp_path / "images"), pairs):
        backbone = Watched()
        goal = _objective(windows=4, window_steps=3, teacher_cfg=5.0)
        job = tiny_job(tmp_path / dataset.name, backbone, dataset=dataset, steps=4, objective=goal, keeping=UNCHECKED)
        finetune(job, SilentProgress())
        assert len(backbone.calls) == 4 * (3 * 2 + 1)
        fresh = TinyBackbone()
        last = backbone.calls[-7:]
        for x_diff, tau, context, output in last[:-1]:
            assert not output.requires_grad
            assert torch.equal(output, fresh(x_diff, tau, {"context": context}))
        x_diff, tau, context, output = last[-1]
        assert output.requires_grad and not torch.equal(output, fresh(x_diff, tau, {"context": context}))
        empty = dataset.batch([0], dropped=[True]).context
        contexts = [context for _, _, context, _ in last[:2]]
        assert sum(torch.equal(context, empty.expand_as(context)) for context in contexts) == 1


def test_an_unguided_teacher_costs_half(tmp_path):
    backbone = TinyBackbone()
    goal = _objective(windows=2, window_steps=3, teacher_cfg=1.0)
    finetune(tiny_job(tmp_path, backbone, steps=2, objective=goal, keeping=UNCHECKED), SilentProgress())
    assert len(backbone.batch_sizes) == 2 * (3 + 1)


@pytest.mark.parametrize("reflow", [{"consistency": 0.5}, {"drop_worst": 0.4}, {"windows": 2, "window_steps": 2}])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, pairs, reflow):
    options = {"dataset": pairs, "objective": _objective(**reflow), "steps": 6}
    whole = finetune(tiny_job(tmp_path / "a", **options), SilentProgress())
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_job(tmp_path / "b", **options), SilentProgress(3, KeyboardInterrupt()))
    again = finetune(tiny_job(tmp_path / "b", **options), SilentProgress())
    assert whole.losses == again.losses and all(torch.equal(whole.state[key], again.state[key]) for key in whole.state)


def test_the_consistency_phase_changes_what_is_learned(tmp_path, pairs):
    runs = {}
    for share in (0.0, 0.5):
        job = tiny_job(tmp_path / str(share), dataset=pairs, steps=6, objective=_objective(consistency=share))
        runs[share] = finetune(job, SilentProgress()).losses
    assert runs[0.0][:3] == runs[0.5][:3] and runs[0.0][3:] != runs[0.5][3:]


def test_the_worst_pairs_are_left_out(tmp_path, pairs, monkeypatch):
    batch = pairs.batch(range(6))
    distance = (batch.latent * 0.5 - batch.noise).flatten(1).norm(dim=1)
    kept = without_worst(pairs, 0.34, TinyBackbone(), SilentProgress())
    assert kept.pairs.tolist() == sorted(distance.argsort()[:4].tolist())
    assert "2 pairs of greatest distance left out" in kept.summary() and kept.identity() != pairs.identity()
    assert without_worst(pairs, 0.1, TinyBackbone(), SilentProgress()) is pairs  # less than one pair
    assert len(without_worst(pairs, 0.99, TinyBackbone(), SilentProgress())) == 1

    measured = []
    original = pair_distances._measured
    monkeypatch.setattr(pair_distances, "_measured", lambda d, p, b: measured.append(p) or original(d, p, b))
    again = without_worst(pairs, 0.34, TinyBackbone(), SilentProgress())
    assert measured == [] and again.pairs.tolist() == kept.pairs.tolist()
    more = make(tmp_path / "pairs", 8, dtype="fp32", seed=5)
    without_worst(more, 0.34, TinyBackbone(), SilentProgress())
    assert measured == [[6, 7]]
    [file] = (tmp_path / "pairs").glob("distances-*")
    file.write_bytes(b"broken")
    assert without_worst(more, 0.5, TinyBackbone(), SilentProgress()).pairs.shape == (4,)
    assert measured[1:] == [list(range(8))]


def test_recipes_are_complete_and_say_where_sampling_starts(host):
    [fast] = Diff2FlowReflowRecipe().build("fast")
    assert (fast.loss, fast.time_distribution, fast.t_range, fast.weighting) == (
        "pseudo_huber",
        "u_shaped",
        "clamped",
        "eps",
    )
    assert fast.reflow.drop_worst == 0.1 and fast.caption_dropout == 0.1
    assert Diff2FlowReflowRecipe().build("fast", weighting="velocity")[0].weighting == "velocity"
    [paper] = Diff2FlowReflowRecipe().build("paper", drop_worst=0.5, consistency=0.2)["result"]
    assert (paper.loss, paper.time_distribution, paper.t_range, paper.weighting) == (
        "l2",
        "uniform",
        "full",
        "velocity",
    )
    assert paper.reflow == ReflowSettings(consistency=0.2)
    [windows] = Diff2FlowReflowRecipe().build("windows", windows=2, teacher_cfg=3.0, drop_worst=0.5, consistency=0.2)[
        "result"
    ]
    assert windows.reflow == ReflowSettings(windows=2, teacher_cfg=3.0)
    with pytest.raises(ValueError, match="Diff2Flow Reflow Recipe: recipe must be one of fast, paper, windows"):
        Diff2FlowReflowRecipe().build("x")
    with pytest.raises(ValueError, match="Diff2Flow Reflow Recipe: windows must be at least 1, not 0"):
        Diff2FlowReflowRecipe().build("windows", windows=0)


def _train(dataset, recipe, preset="light", **inputs):
    [lora], [loss] = Diff2FlowLoraConfig().build(preset, 16, 16.0), Diff2FlowReflowRecipe().build(recipe)
    values = {"objective": "diff2flow", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    values |= {"output_name": "straight", "loss": loss, **inputs}
    return Diff2FlowTrain().train("model", dataset, lora, **values)["result"]


def test_a_reflowed_lora_recommends_few_steps_and_no_guidance(host, tmp_path):
    made = Diff2FlowReflowPairs().build("model", "clip", "a fox", 6, 2, 3.0, 1, "pairs", width=32, height=24)
    dataset, _ = made["result"]
    for recipe, start in (("fast", "terminal"), ("paper", "noise"), ("windows", "terminal")):
        _train(dataset, recipe)
        metadata = host.applied[-1][2]
        found = [metadata[f"diff2flow.{key}"] for key in ("recommended_steps", "recommended_cfg", "start", "recipe")]
        assert found[:3] == ["4", "1", start]
        assert (recipe == "windows") == ('"windows": 4' in found[3])
    _train(dataset, "fast", recommended_steps=2, recommended_cfg=1.5)
    metadata = host.applied[-1][2]
    assert (metadata["diff2flow.recommended_steps"], metadata["diff2flow.recommended_cfg"]) == ("2", "1.5")
    [lora] = Diff2FlowLoraConfig().build("light", 16, 16.0)
    Diff2FlowTrain().train("model", tiny_dataset(tmp_path / "i"), lora, "diff2flow", 1, 2, 1e-3, 0, "style")
    metadata = host.applied[-1][2]
    assert (metadata["diff2flow.recommended_steps"], metadata["diff2flow.recommended_cfg"]) == ("25", "7")


def test_what_does_not_go_together_is_named(host, tmp_path):
    images = tiny_dataset(tmp_path / "images")
    with pytest.raises(ValueError, match="Diff2Flow Train: dataset: 'drawings' holds images, and the recipe"):
        _train(images, "fast")
    host.backbone.base_path = tmp_path / "base.safetensors"
    with pytest.raises(ValueError, match="Diff2Flow Train: lora: recipe 'windows' needs the untrained network"):
        _train(images, "windows", preset="full")
    assert list(host.folder("loras").iterdir()) == []
