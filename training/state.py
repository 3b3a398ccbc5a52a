"""The state of a run on disk: everything that the next step depends on. safetensors and JSON, nothing pickled."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment.precision import FLOAT64
from ..files import DiskFullError, amount, free_bytes
from .checkpoint_file import size_of, write_tensors
from .identity import Facts, all_differences
from .manifest import parsed

_LOG = logging.getLogger(__name__)
_PATTERN, _ABOUT = "state_*.safetensors", "diff2flow.state"
_VERSION = 1
_KINDS = {"step": int, "identity": dict, "optimizer": dict, "groups": list, "scaler": dict}
_LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "z")
"""What optimizers keep in the shape of a parameter."""


@dataclass
class State:
    """What the next step depends on, besides the settings: draws are functions of seed and step (`draws`).

    Args:
        step: steps done.
        parameters: trained values, in the adapters' order.
        averages: of the parameters, where there are any.
        optimizer, scaler: their state_dict.
        losses: of every step done.
        source: name of the file that it was read from.
    """

    step: int
    parameters: list[Tensor]
    averages: list[Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    source: str = ""


def save_state(folder: Path, state: State, identity: Mapping[str, Any], facts: Mapping[str, Facts], keep: int) -> Path:
    """Writes a state whole or not at all, then removes all but the newest `keep`.

    Where there is no room for it, older states make room; the newest of them stays until this one is whole.

    Args:
        folder: of the run's states.
        state: of the run.
        identity, facts: of the run (`find_state`).
        keep: at least 1.

    Raises:
        DiskFullError: there is no room for it; names the folder and the state that is kept.
    """
    tensors = {f"parameter/{i:05d}": value for i, value in enumerate(state.parameters)}
    tensors |= {f"average/{i:05d}": value for i, value in enumerate(state.averages)}
    slots, tensors["losses"] = {}, torch.tensor(state.losses, dtype=FLOAT64)
    for index, values in state.optimizer["state"].items():
        found = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        tensors |= {f"optimizer/{index}/{key}": value for key, value in found.items()}
        slots[str(index)] = {key: value for key, value in values.items() if key not in found}
    about = {
        "version": str(_VERSION),
        "step": state.step,
        "identity": identity,
        "facts": facts,
        "optimizer": slots,
        "groups": state.optimizer["param_groups"],
        "scaler": state.scaler,
    }
    path = folder / f"state_{state.step:08d}.safetensors"
    _write(path, tensors, {_ABOUT: json.dumps(about)})
    for old in states_in(folder)[keep:]:
        _remove(old)
    return path


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    try:
        write_tensors(path, tensors, metadata)
    except DiskFullError as error:
        needed = size_of(tensors, metadata)
        try:
            if not _make_room(path.parent, needed):
                raise error
            write_tensors(path, tensors, metadata)
        except DiskFullError as again:
            kept = states_in(path.parent)
            stays = f"the state of step {_step_of(kept[0])} is kept there" if kept else "no earlier one is there"
            raise DiskFullError(f"{again}; it needs {amount(needed)}; {stays}") from error


def _make_room(folder: Path, needed: int) -> bool:
    """Removes the oldest states, as many as make room, never the newest; whether they did."""
    room, oldest = free_bytes(folder), []
    for path in reversed(states_in(folder)[1:]):
        oldest.append(path)
        room += path.stat().st_size
        if room >= needed:
            _LOG.warning("The disk is full: %s makes room", ", ".join(path.name for path in oldest))
            return all([_remove(path) for path in oldest])
    return False


def _remove(path: Path) -> bool:
    """Whether it could be removed: some systems remove no file that is open."""
    with contextlib.suppress(OSError):
        path.unlink()
        return True
    _LOG.warning("The saved state %s is in use and stays.", path)
    return False


def _step_of(path: Path) -> int:
    number = path.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


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
            differing = all_differences(about["identity"], identity, about.get("facts", {}), facts)
        except Exception as error:  # safetensors' own types; whatever it is, an older state may be whole
            _LOG.warning("The saved state %s cannot be read (%s) and is passed over.", path, error)
            continue
        if not differing:
            return path, []
        differences = differences or differing
    return None, differences


def load_state(path: Path) -> State:
    """The state in a file, on the CPU; what is in it fits together, see also `require_fit`.

    Raises:
        ValueError: it does not; names the file.
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
        source=path.name,
    )


def require_fit(
    state: State,
    parameters: Sequence[Tensor],
    averages: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: Mapping[str, Any],
) -> None:
    """Refuses a state that is not of this run, before anything of it is taken over.

    Args:
        state: that is to be gone on from.
        parameters, averages, optimizer: of the run.
        scaler: the state_dict of the run's.

    Raises:
        ValueError: names the state and what does not fit.
    """
    _require_like(state.parameters, parameters, "trained layers", state)
    _require_like(state.averages, averages, "averages", state)
    for index, values in state.optimizer["state"].items():
        if not 0 <= index < len(parameters):
            raise _other(state, f"its optimizer knows a layer {index}")
        like = [value for key, value in values.items() if key in _LIKE_PARAMETERS and isinstance(value, Tensor)]
        if any(value.shape != parameters[index].shape for value in like if value.dtype != torch.uint8):
            raise _other(state, f"its optimizer has other shapes for layer {index}")
    if not all(_is_group(group) for group in state.optimizer["param_groups"]):
        raise _other(state, "its optimizer's settings are none")
    saved, own = (
        [len(g["params"]) for g in each] for each in (state.optimizer["param_groups"], optimizer.param_groups)
    )
    if saved != own:
        raise _other(state, "its optimizer has other groups of layers")
    for group, fresh in zip(state.optimizer["param_groups"], optimizer.param_groups, strict=True):
        wrong = [key for key in group.keys() & fresh.keys() - {"params"} if _kind(group[key]) != _kind(fresh[key])]
        if wrong:
            raise _other(state, f"its optimizer's {wrong[0]!r} is {str(group[wrong[0]])[:40]!r}")
    scale = {key: _kind(value) for key, value in state.scaler.items()}
    if scale and scale != {**scale, **{key: "number" for key in scaler}}:
        raise _other(state, "its gradient scale is of another form")


def _require_like(saved: Sequence[Tensor], own: Sequence[Tensor], what: str, state: State) -> None:
    if len(saved) != len(own):
        raise _other(state, f"it has {len(saved)} {what} and the run {len(own)}")
    for index, (there, here) in enumerate(zip(saved, own, strict=True)):
        if there.shape != here.shape or there.dtype != here.dtype:
            both = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (there, here)]
            raise _other(state, f"number {index} of its {what} is {both[0]}, that of the run {both[1]}")


def _other(state: State, why: str) -> ValueError:
    return ValueError(
        f"the saved state '{state.source}' does not have this run's layers: {why}; delete it, or set resume to 'new' to"
        " begin again"
    )


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list)


def _kind(value: Any) -> str:
    """What JSON makes of it."""
    if value is None or isinstance(value, (bool, str)):
        return type(value).__name__
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "number"
    return f"list of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__


def restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into parameters of the same shapes, one by one."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _about(path: Path) -> dict[str, Any]:
    """What a state says of itself; ValueError where that is not what `save_state` writes."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        text = (file.metadata() or {}).get(_ABOUT)
        if text is None:
            raise ValueError("it is no saved state of Diff2Flow")
        about = parsed(text, _VERSION, _KINDS)
        keys = file.keys()
        shape = file.get_slice("losses").get_shape() if "losses" in keys else None
    if shape != [about["step"]]:
        raise ValueError(f"it has losses of the shape {shape} for {about['step']} steps")
    indices = [*about["optimizer"], *(key.split("/")[1] for key in keys if key.startswith("optimizer/"))]
    if not all(index.isdecimal() for index in indices) or not all(map(_is_dict, about["optimizer"].values())):
        raise ValueError("what it says of the optimizer is of another form")
    return about


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _listed(tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors) if name.startswith(f"{kind}/")]
