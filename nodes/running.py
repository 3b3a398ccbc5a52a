"""The node that runs now: what it has to say besides its outputs, and what it has written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hosts import Host
from . import products

_LOG = logging.getLogger(__name__)
_SUMMARIES = ("summary", "report")
"""Names of outputs that say in words what a node has done."""


@dataclass
class _Running:
    """A call of a node's function.

    Args:
        name: of the node, as the page shows it.
        node: id of its class.
        inputs: by name.
    """

    name: str
    node: str
    inputs: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)


_running: ContextVar[_Running] = ContextVar("running")


@contextmanager
def running(name: str, node: str, inputs: Mapping[str, Any]) -> Iterator[list[str]]:
    """A node runs while the context lasts; what it has to say is collected."""
    call = _Running(name, node, inputs)
    token = _running.set(call)
    try:
        yield call.notes
    finally:
        _running.reset(token)


def note(text: str) -> None:
    """Says something about the running node: in the log at once, and in its summary and `ui` (see `with_notes`)."""
    call = _running.get()
    _LOG.warning("%s: %s", call.name, text)
    call.notes.append(text)


def note_patches(host: Host, model: Any, what: str) -> None:
    """Says what becomes of patches on a MODEL that act in sampling only, where there are any."""
    patches = host.sampling_patches(model)
    if patches:
        note(f"model: the following patches {what}: {', '.join(patches)}")


def written(*paths: Path) -> None:
    """Keeps in mind what the running node has written, so that it runs again where that is gone."""
    call = _running.get()
    products.written(call.node, call.inputs, paths)


def with_notes(node: Any, returned: Any, notes: list[str]) -> Any:
    """What a node's function has returned, with the notes in its summary, where it has one, and in its `ui`.

    Args:
        node: the node, or its class.
        returned: its outputs, or {"ui": ..., "result": outputs}.
    """
    shown = isinstance(returned, dict)
    if not (notes or shown):
        return returned
    outputs = list(returned["result"] if shown else returned)
    for index, name in enumerate(getattr(node, "RETURN_NAMES", ())):
        if name in _SUMMARIES:
            outputs[index] = "\n".join((outputs[index], *notes))
    ui = {**(returned["ui"] if shown else {}), "notes": notes}
    return {"ui": ui, "result": tuple(outputs)}
