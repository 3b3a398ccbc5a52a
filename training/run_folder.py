"""Where a run keeps its states, log and samples: output/diff2flow/<name>, and which run is continued."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import confined, remove_parts, written_whole
from .choices import RESUME
from .identity import Facts
from .state import State, find_state, load_state, save_state, states_in

_LOG = logging.getLogger(__name__)
_ABOUT, _STATES = "run.json", "states"
_SHOWN = 8


@dataclass(frozen=True)
class RunFolder:
    """A run on disk.

    Args:
        path: its folder.
        identity: what must be equal for it to be continued.
        state: file to continue from, or None.
        facts: what digests in the identity are made of, see `state.find_state`.
        note: why it does not continue the run that was there, "" where nothing is to be said.
    """

    path: Path
    identity: Mapping[str, Any]
    state: Path | None = None
    facts: Mapping[str, Facts] = field(default_factory=dict)
    note: str = ""

    def resumed(self) -> State | None:
        """The state to continue from."""
        return None if self.state is None else load_state(self.state)

    def save(self, state: State, keep: int) -> Path:
        """Writes a state; see `state.save_state`."""
        return save_state(self.path / _STATES, state, self.identity, self.facts, keep)

    @property
    def product(self) -> str:
        """Name of the file that this run saved its LoRA or checkpoint as; "" if it has none yet."""
        return _read(self.path).get("product", "")

    def record_product(self, name: str) -> None:
        """Remembers that name: the run, continued, replaces its own file and no other."""
        _write(self.path, {**_read(self.path), "product": name})


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

    Raises:
        ValueError: another `resume`, or a name that leads out of the root.
    """
    if resume not in RESUME:
        raise ValueError(f"resume must be one of {', '.join(RESUME)}, not {resume!r}")
    confined(root, name)
    existing, facts, note = list(_existing(root, name)), facts or {}, ""
    for path in reversed(existing) if resume == "auto" else ():
        state, differences = find_state(path / _STATES, identity, facts)
        if state is not None:
            _LOG.info("Continues the run '%s' from %s", path.name, state.name)
            _clean(path)
            return RunFolder(path, identity, state, facts)
        if differences and not note:
            note = f"the run '{path.name}' is not continued: {_few(differences)}"
    bare = resume == "auto" and _is_bare(existing, identity)
    path = existing[-1] if bare else _numbered(root, name, len(existing) + 1)
    _clean(path)
    _write(path, {"identity": identity})
    note = note and f"{note}; '{path.name}' begins anew"
    return RunFolder(path, identity, None, facts, note)


def _few(differences: Sequence[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _clean(path: Path) -> None:
    """Removes what a killed process of this run left half written."""
    for folder in (path, path / _STATES, path / "samples"):
        remove_parts(folder)


def _is_bare(existing: Sequence[Path], identity: Mapping[str, Any]) -> bool:
    """Whether the newest of these runs is this one, ended before its first state: it can begin anew in its folder."""
    about = _read(existing[-1]) if existing else {}
    same = about.get("identity") == json.loads(json.dumps(identity)) and "product" not in about
    return same and not states_in(existing[-1] / _STATES)


def _existing(root: Path, name: str) -> Iterator[Path]:
    number = 1
    while (path := _numbered(root, name, number)).exists():
        yield path
        number += 1


def _numbered(root: Path, name: str, number: int) -> Path:
    return confined(root, name if number == 1 else f"{name}_{number:05d}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, about: Mapping[str, Any]) -> None:
    with written_whole(path / _ABOUT) as temporary:
        temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")
