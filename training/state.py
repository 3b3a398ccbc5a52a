"""The state of a run on disk: everything that the next step depends on. safetensors and JSON, nothing pickled."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment.precision import FLOAT64
from ..files import written_whole
from .identity import Facts, all_differences

_LOG = logging.getLogger(__name__)
_PATTERN = "state_*.safetensors"
_VERSION = "1"


@dataclass
class State:
    """What the next step depends on, besides the settings: draws are functions of seed and step (`draws`).

    Args:
        step: steps done.
        parameters: trained values, in the adapters' order.
        averages: of the parameters, where there are any.
        optimizer, scaler: their state_dict.
        losses: of every step done.
    """

    step: int
    parameters: list[Tensor]
    averages: list[Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def save_state(folder: Path, state: State, identity: Mapping[str, Any], facts: Mapping[str, Facts], keep: int) -> Path:
    """Writes a state whole or not at all, then removes all but the newest `keep`.

    Args:
        folder: of the run's states.
        identity, facts: of the run (`find_state`).
        keep: at least 1.
    """
    from safetensors.torch import save_file

    tensors = {f"parameter/{i:05d}": value for i, value in enumerate(state.parameters)}
    tensors |= {f"average/{i:05d}": value for i, value in enumerate(state.averages)}
    slots, tensors["losses"] = {}, torch.tensor(state.losses, dtype=FLOAT64)
    for index, values in state.optimizer["state"].items():
        found = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        tensors |= {f"optimizer/{index}/{key}": value for key, value in found.items()}
        slots[str(index)] = {key: value for key, value in values.items() if key not in found}
    about = {
        "version": _VERSION,
        "step": state.step,
        "identity": identity,
        "facts": facts,
        "optimizer": slots,
        "groups": state.optimizer["param_groups"],
        "scaler": state.scaler,
    }
    path = folder / f"state_{state.step:08d}.safetensors"
    copies = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
    with written_whole(path) as temporary:
        save_file(copies, str(temporary), {"diff2flow.state": json.dumps(about)})
    for old in states_in(folder)[keep:]:
        old.unlink()
    return path


def states_in(folder: Path) -> list[Path]:
    """Files of states, the newest first."""
    return sorted(folder.glob(_PATTERN), reverse=True)


def find_state(folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Facts]) -> tuple[Path | None, list[str]]:
    """The newest state of a run with this identity, and in words what differs in the newest one if there is none.

    `facts` are what the digests in the identity are made of, by their names there.

    A file that cannot be read is named in the log and passed over.
    """
    differences: list[str] = []
    for path in states_in(folder):
        try:
            about = _about(path)
        except Exception as error:  # safetensors' own types; whatever it is, an older state may be whole
            _LOG.warning("The saved state %s cannot be read (%s) and is passed over.", path, error)
            continue
        differing = all_differences(about["identity"], identity, about.get("facts", {}), facts)
        if not differing:
            return path, []
        differences = differences or differing
    return None, differences


def load_state(path: Path) -> State:
    """The state in a file, on the CPU.

    Raises:
        Exception: safetensors' own, for a file that is cut short.
    """
    from safetensors.torch import load_file

    about, tensors = _about(path), load_file(str(path))
    slots: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in about["optimizer"].items()}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, key = rest.partition("/")
            slots.setdefault(int(index), {})[key] = value
    return State(
        step=about["step"],
        parameters=_listed(tensors, "parameter"),
        averages=_listed(tensors, "average"),
        optimizer={"state": slots, "param_groups": about["groups"]},
        scaler=about["scaler"],
        losses=tensors["losses"].tolist(),
    )


def restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into parameters, one by one.

    Raises:
        ValueError: their number or shapes differ.
    """
    shapes = [tuple(p.shape) for p in parameters], [tuple(v.shape) for v in values]
    if shapes[0] != shapes[1]:
        raise ValueError("the saved state does not have this run's layers; set resume to 'new' to begin again")
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _about(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return json.loads((file.metadata() or {})["diff2flow.state"])


def _listed(tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors) if name.startswith(f"{kind}/")]
