"""Widgets without effect: the table is right and complete, and a value that has none is named."""

import inspect
import itertools
import logging

import pytest
import torch
from PIL import Image
from torch import nn

from diff2flow_nodes import hosts
from diff2flow_nodes.alignment import NoiseSchedule
from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS
from diff2flow_nodes.nodes.effects import COUNTS_WHEN, EFFECTS, counts, without_effect
from diff2flow_nodes.nodes.texts import node_inputs
from diff2flow_nodes.samplers import integrate
from diff2flow_nodes.tests.training_fakes import FakeHost, TinyBackbone, tiny_dataset
from diff2flow_nodes.training.layers import choose_layers, choose_text_layers
from diff2flow_nodes.training.objective import Objective
from diff2flow_nodes.training.optimizers import build_optimizer

SOCKETS = ("MODEL", "CLIP", "VAE", "IMAGE", "MASK", "LATENT", "CONDITIONING", "D2F_DATASET")


class Part:
    """A MODEL, CLIP or VAE of the small host."""

    def __init__(self, name):
        self._name = name

    def __str__(self):
        return self._name


MODEL, CLIP, VAE = Part("model"), Part("clip"), Part("vae")


@pytest.fixture
def host(tmp_path):
    host, before = FakeHost(tmp_path), list(hosts._chosen)
    hosts.use(host)
    (host.folder("input") / "ink").mkdir()
    for i in range(2):
        Image.new("RGB", (48, 32), (60 * i, 0, 90)).save(host.folder("input") / "ink" / f"{i}.png")
    yield host
    hosts._chosen[:] = before


def outputs(node, **inputs):
    """What a node returns, with or without something to show."""
    made = NODE_CLASS_MAPPINGS[node]()
    returned = getattr(made, made.FUNCTION)(**inputs)
    return returned["result"] if isinstance(returned, dict) else returned


def noted(node, **inputs):
    """What a node says has no effect."""
    made = NODE_CLASS_MAPPINGS[node]()
    returned = getattr(made, made.FUNCTION)(**inputs)
    return returned["ui"]["notes"] if isinstance(returned, dict) else []


@pytest.mark.parametrize("node", EFFECTS)
def test_the_table_names_inputs_and_values_that_exist(node):
    declared = node_inputs(NODE_CLASS_MAPPINGS[node])
    for name, alternatives in EFFECTS[node].items():
        assert declared[name][1][COUNTS_WHEN] == list(alternatives), "the page is told"
        for other, test in (item for each in alternatives for item in each.items()):
            kind = declared[other][0]
            assert ("linked" in test) == (kind in SOCKETS)
            if isinstance(kind, list) and other != "lora_name":
                assert set(test.get("is", test.get("not"))) < set(kind)


def test_the_page_is_told_of_no_other():
    told = {
        (node, name)
        for node, cls in NODE_CLASS_MAPPINGS.items()
        for name, (_, options) in node_inputs(cls).items()
        if COUNTS_WHEN in options
    }
    assert told == {(node, name) for node, table in EFFECTS.items() for name in table}


class _Every(nn.Module):
    """A layer of every group."""

    NAMES = ("conv_in", "conv_out", "d.attn1.to_q", "d.attn2.to_q", "d.attn1.to_out.0", "d.ff.net.2", "d.proj_in",
             "d.conv1", "time_embedding.linear_1", "text.self_attn.q_proj")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) if "conv" in name else nn.Linear(8, 8) for name in self.NAMES)

    def names(self):
        return {f"layers.{i}": name for i, name in enumerate(self.NAMES)}


def _layers(**inputs):
    """Which layers a D2F_LORA trains, and how, for images and for depth."""
    [settings] = outputs("Diff2FlowLoraConfig", **inputs)
    network = _Every()
    if settings.full:
        return "full"
    found = [choose_text_layers(network, network.names(), settings)]
    for channels in (0, 8):
        try:
            found.append(choose_layers(network, network.names(), settings, channels))
        except ValueError as error:
            found.append(str(error))
    return found


def _loss(**inputs):
    """Times, loss and the rest of a D2F_LOSS."""
    [settings] = outputs("Diff2FlowLossConfig", **inputs)
    objective = Objective(settings, NoiseSchedule.scaled_linear(), "v")
    generator = torch.Generator().manual_seed(0)
    x_data, x_noise = torch.randn(2, 2, 4, 4, 4, generator=generator)
    t = objective.times(torch.tensor([0.01, 0.3]))
    loss = objective.loss(TinyBackbone("v"), x_data, x_noise, t, {"context": torch.ones(2, 3, 6)})
    rest = settings.caption_dropout, settings.reflow, settings.pairing, objective.schedule.is_zero_terminal_snr
    return t.tolist(), loss.tolist(), rest


def _recipe(**inputs):
    return outputs("Diff2FlowReflowRecipe", **inputs)


def _solver(solver="euler", rtol=1e-3, atol=1e-4):
    times = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
    return integrate(lambda x, t: torch.sin(9 * t) * x, torch.ones(1, 1), times, solver, rtol=rtol, atol=atol).tolist()


def _optimizer(**inputs):
    """Weights after three steps."""
    [settings] = outputs("Diff2FlowOptimizerConfig", **inputs)
    weight = nn.Parameter(torch.ones(2, 2))
    betas = (settings.beta1, settings.beta2)
    optimizer = build_optimizer(settings.name, {"network": [weight]}, 0.1, betas, settings.weight_decay)
    for scale in (1.0, -0.5, 2.0):
        weight.grad = scale * torch.arange(4.0).reshape(2, 2)
        optimizer.step()
    return weight.tolist()


MADE = {
    "Diff2FlowLoraConfig": (_layers, {"preset": "light", "rank": 16, "alpha": 16.0}),
    "Diff2FlowLossConfig": (_loss, {}),
    "Diff2FlowReflowRecipe": (_recipe, {"recipe": "fast"}),
    "Diff2FlowSolver": (_solver, {}),
    "Diff2FlowOptimizerConfig": (_optimizer, {}),
}
OTHER = {"rank": 4, "alpha": 2.0, "rank_ratio": 0.5, "rtol": 1e-1, "atol": 1e-1, "beta1": 0.5, "beta2": 0.5,
         "drop_worst": 0.5, "consistency": 0.3, "windows": 2, "window_steps": 3, "teacher_cfg": 2.0, "logit_mean": 1.0,
         "logit_spread": 2.0, "delta": 0.01, "widening": "halved"}  # fmt: skip


@pytest.mark.parametrize("node", MADE)
def test_a_widget_counts_just_where_the_table_says(node):
    """Every widget of the table is changed beside every combination of those that decide."""
    make, needed = MADE[node]
    declared = node_inputs(NODE_CLASS_MAPPINGS[node])
    deciding = sorted({other for alternatives in EFFECTS[node].values() for each in alternatives for other in each})
    for chosen in itertools.product(*(_values(declared[name]) for name in deciding)):
        base = {**needed, **dict(zip(deciding, chosen, strict=True))}
        for name, alternatives in EFFECTS[node].items():
            default = declared[name][1]["default"]
            plain, changed = {**base, name: default}, {**base, name: _other(name, default)}
            values = {key: options.get("default") for key, (_, options) in declared.items()} | changed
            assert (make(**plain) != make(**changed)) == counts(alternatives, values), (name, base)


@pytest.mark.parametrize("node", sorted(MADE.keys() - {"Diff2FlowSolver"}))
def test_a_widget_outside_of_the_table_always_counts(node):
    """It changes what the node hands on, whatever decides over the others."""
    declared = node_inputs(NODE_CLASS_MAPPINGS[node])
    needed = {name: options["default"] for name, (_, options) in declared.items()}
    for name in declared.keys() - EFFECTS[node].keys():
        kind, options = declared[name]
        other = {"STRING": "*attn*", "BOOLEAN": not options["default"], "INT": 7, "FLOAT": 0.25}
        changed = next(each for each in kind if each != options["default"]) if isinstance(kind, list) else other[kind]
        assert outputs(node, **needed) != outputs(node, **{**needed, name: changed}), name


def _values(declared):
    kind, options = declared
    if isinstance(kind, list):
        return [value for value in kind if value not in ("adamw_8bit", "prodigy", "schedule_free")]  # of other packages
    return [True, False] if kind == "BOOLEAN" else [options["default"], 0.5]


def _other(name, default):
    return not default if isinstance(default, bool) else OTHER[name]


def test_a_value_without_effect_is_named_in_the_log_and_in_what_is_shown(host, caplog):
    with caplog.at_level(logging.WARNING):
        notes = noted("Diff2FlowLoraConfig", preset="light", rank=64, alpha=16.0, conv=True)
    assert notes == [
        "rank (64) has no effect: it counts where preset is 'custom' and rank_ratio is 0.0",
        "conv (True) has no effect: it counts where preset is 'custom'",
    ]
    assert [f"Diff2Flow LoRA Config: {note}" for note in notes] == caplog.messages
    assert noted("Diff2FlowLoraConfig", preset="custom", rank=64, alpha=16.0, conv=True) == []
    assert noted("Diff2FlowReflowRecipe", recipe="fast", windows=8) == [
        "windows (8) has no effect: it counts where recipe is 'windows'"
    ]
    watch = {"vae": VAE, "clip": CLIP, "prompts": "a fox", "sample_every": 0, "sample_steps": "25", "cfg": 7.0}
    notes = noted("Diff2FlowTrainWatch", **watch, width=512, height=512, seed=0)
    assert notes == [
        "prompts ('a fox') has no effect: it counts where sample_every is not 0 and images is not connected"
    ]


def test_a_summary_names_what_has_no_effect(host):
    inputs = {"folder": "ink", "vae": VAE, "clip": CLIP, "resolution": 32, "default_caption": "ink"}
    dataset, summary = outputs("Diff2FlowImageDataset", **inputs, max_aspect=3.0, mask_floor=0.2)
    plain, without = outputs("Diff2FlowImageDataset", **inputs)
    assert summary.splitlines()[-2:] == [
        "max_aspect (3.0) has no effect: it counts where bucketing is 'aspect'",
        "mask_floor (0.2) has no effect: it counts where alpha is 'mask'",
    ]
    assert "no effect" not in without and dataset.buckets == plain.buckets
    [*_, last] = outputs(
        "Diff2FlowReflowPairs", model=MODEL, clip=CLIP, prompts="a fox", count=1, steps=1, cfg=1.0, seed=0,
        folder="pairs", negative="bad", width=32, height=32,
    )[1].splitlines()  # fmt: skip
    assert last == "negative ('bad') has no effect: it counts where cfg is not 1.0"


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({}, []),
        ({"ensemble": 1, "reduction": "mean"}, ["reduction"]),
        ({"ensemble": 2, "reduction": "mean"}, []),
    ],
)
def test_of_depth(inputs, found):
    declared = node_inputs(NODE_CLASS_MAPPINGS["Diff2FlowDepth"])
    assert [line.split(" ")[0] for line in without_effect("Diff2FlowDepth", declared, inputs)] == found


def test_train_names_what_the_connected_nodes_set_in_vain(host, tmp_path):
    [lora] = outputs("Diff2FlowLoraConfig", preset="paper-base", rank=16, alpha=16.0, widening="halved")
    [optimizer] = outputs("Diff2FlowOptimizerConfig", text_rate=0.1)
    [loss] = outputs("Diff2FlowLossConfig", t_range="full", weighting="eps")
    common = {"model": MODEL, "dataset": tiny_dataset(tmp_path / "data"), "steps": 2, "batch_size": 2, "seed": 0}
    common |= {"learning_rate": 1e-3, "output_name": "ink", "lora": lora, "optimizer": optimizer, "loss": loss}
    assert noted("Diff2FlowTrain", **common, objective="diffusion") == [
        "lora: widening ('halved') has no effect: it counts where the dataset holds depth",
        "optimizer: text_rate (0.1) has no effect: it counts where text_encoder is on in Diff2Flow LoRA Config",
        "loss: t_range ('full') has no effect: it counts where objective is 'diff2flow'",
        "loss: weighting ('eps') has no effect: it counts where objective is 'diff2flow'",
    ]
    [light] = outputs("Diff2FlowLoraConfig", preset="light", rank=16, alpha=16.0)
    common |= {"lora": light, "optimizer": None}
    assert noted("Diff2FlowTrain", **common, objective="diff2flow") == []


def test_patches_that_training_does_not_call_are_named(host, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeHost, "sampling_patches", lambda self, model: ("FreeU_V2 (output_block_patch)",))
    [lora] = outputs("Diff2FlowLoraConfig", preset="light", rank=16, alpha=16.0)
    [note] = noted("Diff2FlowTrain", model=MODEL, dataset=tiny_dataset(tmp_path / "data"), lora=lora, steps=1, seed=0,
                   objective="diff2flow", batch_size=1, learning_rate=1e-3, output_name="ink")  # fmt: skip
    assert note.startswith("model: the following patches are not trained with") and "FreeU_V2 (output" in note
    [*_, line] = outputs(
        "Diff2FlowReflowPairs", model=MODEL, clip=CLIP, prompts="a fox", count=1, steps=1, cfg=3.0, seed=0,
        folder="pairs", width=32, height=32,
    )[1].splitlines()  # fmt: skip
    assert line.startswith("model: the following patches have no effect on the pairs") and "FreeU_V2" in line


def test_every_node_that_is_run_goes_through_the_checks():
    for cls in NODE_CLASS_MAPPINGS.values():
        assert hasattr(inspect.getattr_static(cls, cls.FUNCTION), "__wrapped__"), cls
