"""What comes into a node by API and is not what belongs there: one sentence with node, input and value."""

import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from diff2flow_nodes.nodes.sockets import kind_of
from diff2flow_nodes.nodes.texts import node_inputs
from diff2flow_nodes.nodes.training_options import WatchConfig
from diff2flow_nodes.tests.training_fakes import FakeHost, tiny_dataset
from diff2flow_nodes.training.finetune import Watch
from diff2flow_nodes.training.layers import LoraSettings
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.settings import OptimizerSettings

PICTURES = ("IMAGE", "MASK")


def kinds(folder):
    """Something of every type that goes through sockets."""
    context = torch.zeros(1, 77, 768)
    return {
        "LATENT": {"samples": torch.zeros(1, 4, 8, 8)},
        "IMAGE": torch.zeros(1, 8, 8, 3),
        "MASK": torch.zeros(1, 8, 8),
        "SIGMAS": torch.linspace(1, 0, 5),
        "CONDITIONING": [[context, {"pooled_output": context[0]}]],
        "D2F_DATASET": tiny_dataset(folder / "data"),
        "D2F_LORA": LoraSettings(),
        "D2F_LOSS": ObjectiveSettings(),
        "D2F_OPTIMIZER": OptimizerSettings(),
        "D2F_WATCH": WatchConfig(Watch(), 0.0),
        "STRING": "text",
        "FLOAT": 0.5,
        "INT": 3,
        "BOOLEAN": True,
    }


@pytest.fixture
def host(tmp_path):
    before = list(hosts._chosen)
    made = FakeHost(tmp_path)
    made.names = lambda kind: ["a.safetensors"]
    hosts.use(made)
    yield made
    hosts._chosen[:] = before


def refusal(node, **inputs):
    made = NODE_CLASS_MAPPINGS[node]()
    with pytest.raises(hosts.HostError) as caught:
        getattr(made, made.FUNCTION)(**inputs)
    return str(caught.value)


def fits(found, wanted):
    """Whole numbers are numbers, on and off; pictures of another shape have sentences of their own."""
    alike = {"FLOAT": ("INT",), "INT": ("BOOLEAN",), "BOOLEAN": ("INT",), "IMAGE": ("MASK", "SIGMAS"), "MASK": PICTURES}
    return found == wanted or found in alike.get(wanted, ())


def test_types_are_told_apart(tmp_path):
    assert {name: kind_of(value) for name, value in kinds(tmp_path).items()} == {name: name for name in kinds(tmp_path)}
    assert kind_of(object()) == ""


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS)
def test_what_belongs_elsewhere_is_named(host, tmp_path, node):
    """Every socket and widget of every node, with everything that does not belong there."""
    values, title = kinds(tmp_path), NODE_DISPLAY_NAME_MAPPINGS[node]
    for name, (kind, _) in node_inputs(NODE_CLASS_MAPPINGS[node]).items():
        wanted = "STRING" if isinstance(kind, list) else kind
        for found, value in values.items():
            if fits(found, wanted):
                continue
            said = refusal(node, **{name: value})
            assert said.startswith(f"{title}: {name} takes {wanted}, and what came in is ") and found in said, said
            assert said.endswith(f"; connect an output of type {wanted}") and "\n" not in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(host, value):
    found = 0
    for node, cls in NODE_CLASS_MAPPINGS.items():
        for name, (kind, options) in node_inputs(cls).items():
            if kind == "FLOAT":
                found += 1
                wanted = f"{name} must be a finite number, not {value}; {options['default']} is the default"
                assert refusal(node, **{name: value}) == f"{NODE_DISPLAY_NAME_MAPPINGS[node]}: {wanted}"
    assert found > 25
