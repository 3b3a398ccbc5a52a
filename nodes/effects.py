"""Which widgets count only where other inputs have certain values: one table, which the log and the page go by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..training.layers import PRESETS

Condition = Mapping[str, Mapping[str, Any]]
"""What must hold of other inputs of the node, all of it: {"is": values}, {"not": values} or {"linked": whether}."""
Alternatives = Sequence[Condition]
"""One of them is enough."""

COUNTS_WHEN = "counts_when"
"""Option of an input in INPUT_TYPES that tells the page."""


def _is(*values: Any) -> dict[str, Any]:
    return {"is": list(values)}


def _not(*values: Any) -> dict[str, Any]:
    return {"not": list(values)}


_LINKED, _OPEN = {"linked": True}, {"linked": False}
_CUSTOM = ({"preset": _is("custom")},)
_ASPECT = ({"bucketing": _is("aspect")},)
_WINDOWS = ({"recipe": _is("windows")},)
_DOPRI5 = ({"solver": _is("dopri5")},)
_LOGIT = ({"time_distribution": _is("logit_normal")},)
_SAMPLED = ({"sample_every": _not(0)},)
_OF_PROMPTS = ({"sample_every": _not(0), "images": _OPEN},)

EFFECTS: Mapping[str, Mapping[str, Alternatives]] = {
    "Diff2FlowCheckpointLoader": {"lora_strength": ({"lora_name": _not("None")},)},
    "Diff2FlowSolver": {"rtol": _DOPRI5, "atol": _DOPRI5},
    "Diff2FlowEvaluate": {"seed": ({"model": _LINKED, "dataset": _LINKED},)},
    "Diff2FlowDepth": {"reduction": ({"ensemble": _not(1)},)},
    "Diff2FlowImageDataset": {
        "bucket_step": _ASPECT,
        "max_aspect": _ASPECT,
        "no_upscale": _ASPECT,
        "mask_floor": ({"alpha": _is("mask")},),
    },
    "Diff2FlowImages": {"mask_floor": ({"mask": _LINKED},)},
    "Diff2FlowDepthDataset": {
        "unit": ({"layout": _is("auto", "folders")},),
        "bucket_step": _ASPECT,
        "max_aspect": _ASPECT,
    },
    "Diff2FlowReflowPairs": {"negative": ({"cfg": _not(1.0)},)},
    "Diff2FlowReflowRecipe": {
        "drop_worst": ({"recipe": _is("fast")},),
        "consistency": ({"recipe": _is("fast", "paper")},),
        "windows": _WINDOWS,
        "window_steps": _WINDOWS,
        "teacher_cfg": _WINDOWS,
    },
    "Diff2FlowLoraConfig": {
        "rank": ({"preset": _is("custom"), "rank_ratio": _is(0.0)},),
        **dict.fromkeys(
            ("alpha", "rank_ratio", "self_attention", "cross_attention", "attention_out", "feed_forward", "proj"),
            _CUSTOM,
        ),
        **dict.fromkeys(("conv", "time", "ends_in_full"), _CUSTOM),
        "widening": (
            {"preset": _is(*(name for name, preset in PRESETS.items() if preset.ends_in_full))},
            {"preset": _is("custom"), "ends_in_full": _is(True)},
        ),
    },
    "Diff2FlowLossConfig": {
        "logit_mean": _LOGIT,
        "logit_spread": _LOGIT,
        "delta": ({"loss": _is("huber", "pseudo_huber")},),
    },
    "Diff2FlowOptimizerConfig": {
        "beta1": ({"optimizer": _not("adafactor")},),
        "beta2": ({"optimizer": _not("adafactor")},),
    },
    "Diff2FlowTrainWatch": {
        **dict.fromkeys(("sample_steps", "seed", "solver"), _SAMPLED),
        **dict.fromkeys(("prompts", "cfg", "width", "height"), _OF_PROMPTS),
        "negative": ({**_OF_PROMPTS[0], "cfg": _not(1.0)},),
        "held_out_share": ({"validate_every": _not(0), "validation": _OPEN},),
    },
}
"""By node and input. What is not here always counts, or is refused with a sentence where it does not."""


def tells_the_page(node: type) -> type:
    """Class decorator: INPUT_TYPES gives the page the node's part of the table, so that it hides what has no effect."""
    plain = node.INPUT_TYPES  # type: ignore[attr-defined]
    table = EFFECTS[node.__name__]

    def input_types(cls: type) -> dict[str, Any]:
        return {
            group: {
                name: (kind, {**options, COUNTS_WHEN: list(table[name])} if name in table else options)
                for name, (kind, options) in inputs.items()
            }
            for group, inputs in plain().items()
        }

    node.INPUT_TYPES = classmethod(input_types)  # type: ignore[attr-defined]
    return node


def without_effect(node: str, declared: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """A sentence for each input whose value differs from its default and has no effect beside the others' values.

    Args:
        node: id of its class.
        declared: type and options of its inputs, by name.
        inputs: their values; what lacks has its default.
    """
    values = {name: _default(each) for name, each in declared.items()} | dict(inputs)
    return [
        f"{name} ({values[name]!r}) has no effect: it counts where {in_words(alternatives)}"
        for name, alternatives in EFFECTS.get(node, {}).items()
        if not _equal(values[name], _default(declared[name])) and not counts(alternatives, values)
    ]


def counts(alternatives: Alternatives, values: Mapping[str, Any]) -> bool:
    """Whether a widget has an effect beside these values of the node's inputs."""
    return any(all(_holds(test, values.get(name)) for name, test in each.items()) for each in alternatives)


def in_words(alternatives: Alternatives) -> str:
    """ "preset is 'custom' and rank_ratio is 0.0"."""
    return ", or where ".join(
        " and ".join(f"{name} {_test_in_words(test)}" for name, test in each.items()) for each in alternatives
    )


def _test_in_words(test: Mapping[str, Any]) -> str:
    if "linked" in test:
        return "is connected" if test["linked"] else "is not connected"
    kind = "is" if "is" in test else "not"
    return f"is {'not ' if kind == 'not' else ''}{' or '.join(repr(value) for value in test[kind])}"


def _holds(test: Mapping[str, Any], value: Any) -> bool:
    if "linked" in test:
        return (value is not None) == test["linked"]
    if "is" in test:
        return any(_equal(value, each) for each in test["is"])
    return not any(_equal(value, each) for each in test["not"])


def _equal(one: Any, other: Any) -> bool:
    """As Python has it; of numbers, but for rounding."""
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (one, other))
    return math.isclose(one, other) if numbers else bool(one == other)


def _default(declared: Any) -> Any:
    kind, options = declared
    return options.get("default", kind[0] if isinstance(kind, list) and kind else None)
