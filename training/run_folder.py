"""Where a run keeps its states, log and samples: output/diff2flow/<name>, and which run is continued."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import numbered, remove_parts, written_whole
from .choices import RESUME
from .identity import Facts
from .lock import Lock
from .manifest import VERSION, parsed
from .state import State, find_state, load_state, save_state, states_in

_LOG = logging.getLogger(__name__)
_ABOUT, _STATES, _LOCK = "run.json", "states", ".lock"
_SHOWN = 8
_VERSION = 1
_KINDS = {"identity": dict, "product": (str, type(None)), "steps": (int, type(None))}


@dataclass(frozen=True)
class RunFolder:
    """A run on disk.

    Args:
        path: its folder.
        identity: what must be equal for it to be continued.
        state: file to continue from, or None.
        facts: what digests in the identity are made of, see `state.find_state`.
        note: why it does not continue the run that was there, "" where nothing is to be said.
        lock: keeps other processes out until it is closed; None where another process of this run holds it.
    """

    path: Path
    identity: Mapping[str, Any]
    state: Path | None = None
    facts: Mapping[str, Facts] = field(default_factory=dict)
    note: str = ""
    lock: Lock | None = field(default=None, repr=False, compare=False)

    def close(self) -> None:
        """Lets other processes go on with the run."""
        if self.lock is not None:
            self.lock.close()

    def resumed(self) -> State | None:
        """The state to continue from."""
        return None if self.state is None else load_state(self.state)

    def save(self, state: State, keep: int) -> Path:
        """Writes a state; see `state.save_state`."""
        path = save_state(self.states, state, self.identity, self.facts, keep)
        self._record(begun=True)
        return path

    @property
    def states(self) -> Path:
        """Folder of the states."""
        return self.path / _STATES

    @property
    def product(self) -> str:
        """Name of the file that this run saved its LoRA or checkpoint as; "" if it has none yet."""
        return _read(self.path).get("product") or ""

    def replaces(self, steps: int) -> bool:
        """Whether a file of so many steps replaces the run's own: not where it began anew and has come less far."""
        about = _read(self.path)
        return bool(about.get("begun")) or steps >= (about.get("steps") or 0)

    def record_product(self, name: str, steps: int) -> None:
        """Remembers that name: the run, continued, replaces its own file and no other."""
        self._record(product=name, steps=steps)

    def _record(self, **facts: Any) -> None:
        """Adds to run.json; where that cannot be written, what it is about is saved all the same."""
        about = _read(self.path) or _begun_with(self.identity)
        if about == {**about, **facts}:
            return
        try:
            _write(self.path, {**about, **facts})
        except (OSError, ValueError) as error:
            _LOG.warning("The run '%s' cannot remember %s: %s", self.path.name, facts, error)


def open_run(
    root: Path, name: str, identity: Mapping[str, Any], resume: str, facts: Mapping[str, Facts] | None = None
) -> RunFolder:
    """The folder of a run: the newest one of that name to continue, or a new one.

    Args:
        root: of all runs.
        name: of the run; "name", "name_00002" and so on are looked at.
        identity, facts: see RunFolder.
        resume: "auto" continues a run with the same identity (from its beginning, if it was killed before its first
            state), "new" always begins one.

    The folder is this process's until it is closed.

    Raises:
        ValueError: another `resume`, a name that leads out of the root or is too long, or another process has the run.
    """
    if resume not in RESUME:
        raise ValueError(f"resume must be one of {', '.join(RESUME)}, not {resume!r}")
    existing, facts, note = list(_existing(root, name)), facts or {}, ""
    for path in reversed(existing) if resume == "auto" else ():
        state, differences = find_state(path / _STATES, identity, facts)
        if state is not None:
            _LOG.info("Continues the run '%s' from %s", path.name, state.name)
            return _entered(path, identity, facts)
        if differences and not note:
            note = f"the run '{path.name}' is not continued: {_few(differences)}"
    bare = resume == "auto" and _is_bare(existing, identity)
    if bare:
        run = _entered(existing[-1], identity, facts)
    else:
        folder = _new(root, name, len(existing) + 1)
        run = RunFolder(folder, identity, None, facts, lock=_locked(folder))
        _write(folder, _begun_with(identity))
    return replace(run, note=note and f"{note}; '{run.path.name}' begins anew")


def _few(differences: Sequence[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _begun_with(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {VERSION: _VERSION, "identity": identity}


def _new(root: Path, name: str, number: int) -> Path:
    """A new folder; of two processes that want the same, one gets the next number."""
    while True:
        path = numbered(root, name, number)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


def _entered(path: Path, identity: Mapping[str, Any], facts: Mapping[str, Facts]) -> RunFolder:
    """A run that is there, when no other process has it."""
    lock = _locked(path)
    for folder in (path, path / _STATES, path / "samples"):
        remove_parts(folder)  # what a killed process of this run left half written
    if not (path / _ABOUT).exists():
        _write(path, _begun_with(identity))
    return RunFolder(path, identity, find_state(path / _STATES, identity, facts)[0], facts, lock=lock)


def _locked(path: Path) -> Lock:
    return Lock(
        path / _LOCK,
        f"the run '{path.name}' is trained",
        "wait until it has ended, choose another output_name, or set resume to 'new'",
    )


def _is_bare(existing: Sequence[Path], identity: Mapping[str, Any]) -> bool:
    """Whether the newest of these runs is this one, ended before its first state: it can begin anew in its folder."""
    if not existing or states_in(existing[-1] / _STATES):
        return False
    if all(path.name == _LOCK or path.suffix == ".part" for path in existing[-1].iterdir()):
        return True
    about = _read(existing[-1])
    if about.get("identity") != json.loads(json.dumps(identity)) or about.get("begun"):
        return False
    return not about.get("product") or "steps" in about


def _existing(root: Path, name: str) -> Iterator[Path]:
    number = 1
    while (path := numbered(root, name, number)).exists():
        yield path
        number += 1


def _read(path: Path) -> dict[str, Any]:
    """What run.json says; empty if it is missing or is not what `_write` writes."""
    file = path / _ABOUT
    try:
        return parsed(file.read_text(encoding="utf-8"), _VERSION, _KINDS)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _LOG.warning("The file %s of the run '%s' is not used: %s.", file, path.name, error)
        return {}


def _write(path: Path, about: Mapping[str, Any]) -> None:
    with written_whole(path / _ABOUT) as temporary:
        temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")
