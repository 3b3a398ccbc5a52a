"""Diff2Flow Reflow Pairs on a small host, and headless from a checkpoint to a straightened LoRA."""

import inspect
import json

import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.alignment import NoiseSchedule
from diff2flow_nodes.hosts import HostError, ModelFacts
from diff2flow_nodes.nodes import Diff2FlowLoraConfig, Diff2FlowReflowPairs, Diff2FlowTrain
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint, run_cli
from diff2flow_nodes.tests.training_fakes import FakeHost, tiny_dataset


@pytest.fixture
def host(tmp_path):
    host, before = FakeHost(tmp_path), list(hosts._chosen)
    hosts.use(host)
    yield host
    hosts._chosen[:] = before


def _pairs(**inputs):
    values = {"prompts": "a fox\na {red|blue} cat", "count": 6, "steps": 2, "cfg": 3.0, "seed": 1, "folder": "pairs"}
    return Diff2FlowReflowPairs().build("model", "clip", **{**values, "width": 32, "height": 24, **inputs})["result"]


def test_from_prompts_to_a_reflowed_lora(host):
    dataset, summary = _pairs()
    assert "6 pairs of 32×24 px from 'pairs'" in summary and "euler, 2 steps, CFG 3, seed 1" in summary
    assert dataset.batch([0]).latent.shape == (1, 4, 3, 4) and dataset.batch([0]).pooled.shape == (1, 2)
    assert host.backbone.batch_sizes == [8, 8, 4, 4]
    assert len(host.encoded) == len(set(host.encoded)) <= 4
    [lora] = Diff2FlowLoraConfig().build("light", 16, 16.0)
    model, name, _, _ = Diff2FlowTrain().train("model", dataset, lora, "diff2flow", 2, 2, 1e-3, 0, "straight")["result"]
    assert (model, name) == ("model+lora", "straight.safetensors")
    assert "6 pairs" in host.applied[0][2]["diff2flow.dataset"]
    calls = len(host.backbone.batch_sizes)
    again, _ = _pairs(count=4)
    assert len(host.backbone.batch_sizes) == calls and len(again) == 4


def test_it_runs_under_comfyuis_inference_mode(host):
    with torch.inference_mode():
        dataset, _ = _pairs(batch_size=2)
        more, _ = _pairs(count=8)
        [lora] = Diff2FlowLoraConfig().build("light", 16, 16.0)
        Diff2FlowTrain().train("model", more, lora, "diff2flow", 2, 2, 1e-3, 0, "straight")
    assert len(dataset) == 6 and len(more) == 8
    assert not any(tensor.is_inference() for tensor in (more.pairs, more.batch([0]).latent, more.batch([0]).context))


def test_prompts_come_from_a_file_and_a_dataset_too(host, tmp_path):
    (host.folder("input") / "wildcards").mkdir()
    (host.folder("input") / "wildcards" / "animals.txt").write_text("owl\n")
    (host.folder("input") / "prompts.txt").write_text("an __animals__\n")
    images = tiny_dataset(tmp_path / "images")
    before = Diff2FlowReflowPairs.IS_CHANGED(prompts="a fox", prompts_file="prompts.txt")
    dataset, _ = _pairs(prompts="a fox", prompts_file="prompts.txt", dataset=images, count=5)
    assert list(dataset.captions()) == ["a fox", "an owl", *(f"a drawing, number {i}" for i in range(3))]
    (host.folder("input") / "wildcards" / "animals.txt").write_text("emu\n")
    assert Diff2FlowReflowPairs.IS_CHANGED(prompts="a fox", prompts_file="prompts.txt") != before


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"prompts": ""}, "prompts is empty"),
        ({"prompts": "a {b"}, "prompts: 'a {b' has a '{'"),
        ({"prompts_file": "none.txt"}, "prompts_file: there is no 'none.txt'"),
        ({"prompts_file": "../x"}, "prompts_file: the name '../x' is not allowed"),
        ({"folder": "../out"}, "folder: the name '../out' is not allowed"),
        ({"count": 0}, "count must be at least 1, not 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"cfg": -1.0}, "cfg must be at least 0, not -1.0"),
        ({"width": 30}, "width must be a multiple of 8 px, not 30"),
        ({"solver": "magic"}, "solver must be one of euler"),
        ({"start": "nowhere"}, "start must be one of"),
        ({"batch_size": -1}, "batch_size must be at least 0"),
        ({"save_dtype": "int8"}, "save_dtype must be one of fp16, fp32"),
        ({"shard": 3, "shards": 2}, r"shard must be from 1 to shards \(2\), not 3"),
        ({"damaged": "eat"}, "damaged must be one of skip, refuse"),
    ],
)
def test_what_is_wrong_names_node_and_input(host, inputs, message):
    with pytest.raises(HostError, match="Diff2Flow Reflow Pairs: ") as raised:
        _pairs(**inputs)
    assert message.replace("\\", "") in str(raised.value)
    checked = {"folder", "prompts", "prompts_file", "shard", "shards"}
    if set(inputs) <= checked and inputs != {"prompts": ""}:
        assert message.replace("\\", "") in Diff2FlowReflowPairs.VALIDATE_INPUTS(**inputs)
    assert not host.encoded and not list(host.folder("datasets").iterdir())


def test_a_model_with_more_channels_is_refused(host, monkeypatch):
    facts = ModelFacts("SD1", "eps", NoiseSchedule.scaled_linear(), 9)
    monkeypatch.setattr(host, "facts", lambda model: facts)
    with pytest.raises(HostError, match="Reflow Pairs: model: its network takes 9 input channels"):
        _pairs()


def test_inputs_and_signatures_agree(host):
    node = Diff2FlowReflowPairs
    declared = node.INPUT_TYPES()
    inputs = {**declared["required"], **declared["optional"]}
    parameters = inspect.signature(node.build).parameters
    assert list(parameters)[1:] == list(inputs) == list(inspect.signature(node.IS_CHANGED).parameters)
    for name, (_, options) in declared["optional"].items():
        assert options["default"] == parameters[name].default, name
    assert node.VALIDATE_INPUTS() is True and node.VALIDATE_INPUTS("pairs", "a", "", 1, 2) is True


def test_headless_from_a_checkpoint_to_a_second_round(tmp_path):
    make_checkpoint(tmp_path / "models" / "checkpoints" / "tiny.safetensors")
    link = {"model": ["1", 0], "clip": ["1", 1]}
    made = {"prompts": "a digit {1|2}", "count": 3, "steps": 2, "cfg": 2.0, "seed": 0, "width": 64, "height": 64}
    train = {"objective": "diff2flow", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    workflow = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny.safetensors"}},
        "2": {"class_type": "Diff2FlowReflowPairs", "inputs": {**link, **made, "folder": "round1"}},
        "3": {"class_type": "Diff2FlowLoraConfig", "inputs": {"preset": "light", "rank": 2, "alpha": 2.0}},
        "4": {"class_type": "Diff2FlowLossConfig", "inputs": {"t_range": "full"}},
        "5": {
            "class_type": "Diff2FlowTrain",
            "inputs": {"model": ["1", 0], "dataset": ["2", 0], "lora": ["3", 0], "loss": ["4", 0], **train,
                       "output_name": "reflowed"},
        },
        "6": {
            "class_type": "Diff2FlowReflowPairs",
            "inputs": {**link, **made, "model": ["5", 0], "folder": "round2", "prompts": "", "dataset": ["2", 0]},
        },
    }  # fmt: skip
    done = run_cli(tmp_path, workflow)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "loras" / "reflowed.safetensors").exists()
    manifests = (tmp_path / "models" / "datasets" / name / "manifest.json" for name in ("round1", "round2"))
    first, second = (json.loads(path.read_text()) for path in manifests)
    assert first["identity"]["start"] == "terminal" and second["identity"]["start"] == "noise"
    assert first["identity"]["model"] != second["identity"]["model"] and len(first["about"]["teacher_sha256"]) == 64
    assert second["about"]["loras"][0]["diff2flow.objective"] == "diff2flow"
    assert "it/s" in done.stderr


@pytest.mark.parametrize("cfg, solver, start", [(3.0, "euler", "terminal"), (1.0, "midpoint", "noise")])
def test_headless_pairs_are_what_the_sampler_draws_of_the_same_noise(tmp_path, cfg, solver, start):
    from diff2flow_nodes.hosts.choice import flow_of
    from diff2flow_nodes.hosts.headless.host import HeadlessHost
    from diff2flow_nodes.hosts.headless.sampling import sample

    host, before = HeadlessHost(tmp_path / "models", tmp_path / "input", tmp_path / "output"), list(hosts._chosen)
    make_checkpoint(host.folder("checkpoints") / "tiny.safetensors")
    model, clip, _ = host.load_checkpoint("tiny.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    lora = {f"{key}.lora_down.weight": torch.randn(2, 768), f"{key}.lora_up.weight": torch.randn(32, 2)}
    model, _ = host.apply_lora(model, clip, lora, 0.5, None)
    hosts.use(host)
    try:
        made = Diff2FlowReflowPairs().build(model, clip, "a fox\na long, long prompt", 4, 3, cfg, 7, "pairs",
            width=64, height=32, negative="bad", solver=solver, start=start, save_dtype="fp32")  # fmt: skip
        dataset, _ = made["result"]
    finally:
        hosts._chosen[:] = before
    batch, flow = dataset.batch([1]), flow_of(host.facts(model), start)
    positive, negative = (host.encode_text(clip, text) for text in ("a long, long prompt", "bad"))
    empty = {"samples": torch.zeros(1, 4, 4, 8)}
    drawn, _ = sample(host.as_flow(model, flow), positive, negative, empty, batch.noise,
        host.solver(solver, 1e-3, 1e-4), flow.sigmas(3), cfg)  # fmt: skip
    torch.testing.assert_close(batch.latent, drawn["samples"], rtol=1e-3, atol=1e-3)
