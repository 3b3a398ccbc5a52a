"""Which flow is chosen: by the user, by all LoRAs on a model whatever their order, by the marks of a checkpoint."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from diff2flow_nodes.alignment import NaiveFlow, NoiseSchedule
from diff2flow_nodes.hosts import HostError, choice
from diff2flow_nodes.hosts.choice import FlowChoice, as_trained, choose_flow
from diff2flow_nodes.hosts.port import ModelFacts
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.training.checkpoint_file import Marks, mark_names, marks

PLAIN = NoiseSchedule.scaled_linear()
NOISE = {"modelspec.title": "noise", "diff2flow.objective": "diff2flow", "diff2flow.start": "noise"}
NAIVE = {"modelspec.title": "naive", "diff2flow.objective": "flow_matching", "diff2flow.start": "noise"}
V = {"modelspec.title": "vee", "diff2flow.prediction": "v", "diff2flow.base_name": "mine.safetensors"}
KOHYA = {"ss_network_dim": "16", "modelspec.title": "style"}


@pytest.fixture(autouse=True)
def _nothing_said():
    choice.say_once.cache_clear()


def facts(*loras, prediction="eps", **more):
    return ModelFacts("SD1", prediction, PLAIN, 4, loras=loras, **more)


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_an_ordinary_lora_hides_nothing(caplog):
    assert isinstance(choose_flow(facts(NAIVE, KOHYA)).alignment, NaiveFlow)
    dark = {**V, "diff2flow.zero_terminal_snr": "true"}
    assert choose_flow(facts(dark, KOHYA, prediction="v")).alignment.schedule.is_zero_terminal_snr
    assert choose_flow(facts(KOHYA, NOISE)).start == choose_flow(facts(NOISE, KOHYA)).start == "noise"
    assert not warnings(caplog)


def test_different_objectives_are_named_once(caplog):
    for _ in range(2):
        assert isinstance(choose_flow(facts(NOISE, NAIVE)).alignment, NaiveFlow)
    [said] = warnings(caplog)
    assert "'noise' (objective diff2flow)" in said and "'naive' (objective flow_matching)" in said
    choose_flow(facts(NOISE, NAIVE), prediction="eps")
    choose_flow(facts(NAIVE, NAIVE))
    assert len(warnings(caplog)) == 1


def test_a_lora_on_its_own_base_says_how_that_predicts(caplog):
    assert as_trained(facts(V, base_name="mine.safetensors")).prediction == "v"
    assert as_trained(facts(V, KOHYA, base_name="mine.safetensors")).prediction == "v"
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("lora", "prediction", "by_node", "way_out"),
    [
        (V, "eps", True, "put ModelSamplingDiscrete (v_prediction) behind its loader"),
        ({**V, "diff2flow.base_name": "other.safetensors"}, "eps", False, "ModelSamplingDiscrete (v_prediction)"),
        ({**V, "diff2flow.base_name": ""}, "eps", False, "ModelSamplingDiscrete (v_prediction)"),
        ({**V, "diff2flow.prediction": "eps", "diff2flow.base_name": "x"}, "v", False, "take out the node"),
    ],
    ids=["a node says eps", "another base", "unknown base", "eps on v"],
)
def test_a_lora_of_another_prediction_is_told_with_both(caplog, lora, prediction, by_node, way_out):
    told = as_trained(facts(lora, prediction=prediction, base_name="mine.safetensors"), by_node)
    assert told.prediction == prediction
    [said] = warnings(caplog)
    assert "'vee'" in said and f"sampled as {prediction}" in said and way_out in said and "\n" not in said


def test_a_dark_v_lora_on_an_eps_model_is_refused_by_name():
    with pytest.raises(HostError, match="'vee' was trained on a v-prediction model.*ModelSamplingDiscrete"):
        choose_flow(facts({**V, "diff2flow.zero_terminal_snr": "true"}))
    with pytest.raises(HostError, match="set zero_terminal_snr to 'off'"):
        choose_flow(facts(), zero_terminal_snr="on")


def test_a_second_choice_keeps_what_it_leaves_open():
    first = FlowChoice("v", "on", "noise", 3.0)
    assert FlowChoice().after(first) == FlowChoice("v", "on", "auto", 1.0)
    assert FlowChoice("eps", "off").after(first) == FlowChoice("eps", "off", "auto", 1.0)
    assert FlowChoice().after(None) == FlowChoice()


@pytest.mark.parametrize(
    ("keys", "metadata", "wanted"),
    [
        (["v_pred"], {}, Marks(True)),
        (["model.diffusion_model.v_pred", "ztsnr"], {}, Marks(True, True)),
        ([], {"modelspec.predict_key": "v"}, Marks(True)),
        ([], {"modelspec.prediction_type": "v"}, Marks(True)),
        ([], {"diff2flow.prediction": "v", "diff2flow.zero_terminal_snr": "true"}, Marks(True, True)),
        ([], {"modelspec.predict_key": "epsilon", "diff2flow.zero_terminal_snr": "false"}, Marks()),
        (["model.diffusion_model.out.2.bias"], {}, Marks()),
    ],
)
def test_marks_of_a_checkpoint(keys, metadata, wanted):
    assert marks(keys, metadata) == wanted
    assert marks(mark_names(wanted.v, wanted.zero_terminal_snr), {}) == wanted


SAVED = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
    "2": {"class_type": "ModelSamplingDiscrete", "inputs": {"model": ["1", 0], "sampling": "v_prediction"}},
    "3": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["2", 0], "lora_name": "b.safetensors"}},
    "4": {"class_type": "CheckpointSave", "inputs": {"model": ["3", 0], "clip": ["1", 1], "vae": ["1", 2]}},
}


def saved_with(**changes):
    graph = {
        number: {**node, "inputs": {**node["inputs"], **changes.get(f"n{number}", {})}}
        for number, node in SAVED.items()
    }
    return {"modelspec.predict_key": "epsilon", "prompt": json.dumps(graph)}


@pytest.mark.parametrize(
    ("metadata", "lost"),
    [
        (saved_with(), True),
        (saved_with(n2={"sampling": "eps"}), False),
        (saved_with(n4={"model": ["1", 0]}), False),
        (saved_with(n3={"model": ["9", 0]}), False),
        (saved_with(n3={"model": ["3", 0]}), False),
        ({"prompt": "not json"}, False),
        ({"prompt": "[1]"}, False),
        ({**saved_with(), "modelspec.predict_key": "v"}, False),
    ],
    ids=["v", "eps", "not behind it", "unknown node", "a circle", "no JSON", "no graph", "marked"],
)
def test_v_prediction_that_comfyui_did_not_save_is_seen_in_the_workflow(metadata, lost):
    assert marks([], metadata).lost_v == lost


def test_sigmas_of_a_stock_model_without_signal_at_its_start_are_finite():
    """They begin at sigma = sqrt((1 - a)/a) with ComfyUI's a = 4.897e-08 in place of 0, 4518.76."""
    flow = choose_flow(ModelFacts("SD1", "v", PLAIN.zero_terminal_snr(), 4))
    assert isinstance(flow, FlowParameterization) and flow.t_start == 0.0
    sigmas = flow.sigmas_k(4)
    assert torch.isfinite(sigmas).all() and abs(float(sigmas[0]) - 4518.7637) < 0.5
    assert sigmas[1:].tolist() == pytest.approx([3.0, 1.0, 1 / 3, 0.0])
