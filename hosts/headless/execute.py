"""Runs a planned workflow: every node once, its outputs kept for those that take them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ...files import without_writing
from ..checks import require_given
from .classes import INSTALL
from .graph import Classes, declared, links
from .workflow import Node, Workflow, as_prompt

if TYPE_CHECKING:
    from ...training.parallel import Processes

_DATASET = "D2F_DATASET"

logger = logging.getLogger(__name__)


class NodeFailure(Exception):
    """A node raised; `node` says which, and the cause is chained."""

    def __init__(self, node: Node, cause: BaseException) -> None:
        super().__init__(f"{node.label}: {_one_line(cause)}")
        self.node, self.cause = node, cause


def execute(workflow: Workflow, order: list[str], classes: Classes, processes: Processes | None = None) -> None:
    """Runs the nodes in order, without gradients (training turns them on for itself).

    Args:
        workflow, order, classes: what runs.
        processes: of several, each runs every node, but only the writer writes files; nodes that make datasets run
            in the writer first, so that the others find everything encoded.

    Raises:
        NodeFailure: a node raised an Exception. Interruptions (KeyboardInterrupt) pass through.
    """
    import torch

    prompt = as_prompt(workflow)
    results: dict[str, tuple[Any, ...]] = {}
    with torch.no_grad(), ExitStack() as stack:
        if processes is not None and not processes.is_writer:
            stack.enter_context(without_writing())
        for key in order:
            node = workflow[key]
            logger.info("%s", node.label)
            started = time.monotonic()
            try:
                results[key] = _in_turn(node, classes[node.class_type], results, prompt, processes)
            except Exception as error:
                raise NodeFailure(node, error) from error
            logger.info("%s: %.1f s", node.label, time.monotonic() - started)


def _in_turn(
    node: Node, cls: Any, results: Mapping[str, tuple[Any, ...]], prompt: Mapping[str, Any], processes: Processes | None
) -> tuple[Any, ...]:
    if processes is None or _DATASET not in getattr(cls, "RETURN_TYPES", ()):
        return _run(node, cls, results, prompt)
    with processes.writer_first():
        return _run(node, cls, results, prompt)


def _run(node: Node, cls: Any, results: Mapping[str, tuple[Any, ...]], prompt: Mapping[str, Any]) -> tuple[Any, ...]:
    required, optional, hidden = declared(cls)
    linked = links(node)
    inputs = {name: value for name, value in node.inputs.items() if name in required or name in optional}
    inputs |= {name: results[source][index] for name, (source, index) in linked.items() if name in inputs}
    require_given(inputs, required)
    inputs |= {name: _hidden(kind, node, prompt) for name, kind in hidden.items()}
    returned = getattr(cls(), cls.FUNCTION)(**inputs)
    outputs = returned.get("result", ()) if isinstance(returned, dict) else returned
    outputs = tuple(outputs) if outputs is not None else ()
    wanted = len(getattr(cls, "RETURN_TYPES", ()))
    if len(outputs) < wanted:
        raise TypeError(f"the node class {node.class_type} returned {len(outputs)} outputs where it declares {wanted}")
    return outputs


def _hidden(kind: Any, node: Node, prompt: Mapping[str, Any]) -> Any:
    name = kind[0] if isinstance(kind, (tuple, list)) else kind
    return {"PROMPT": prompt, "UNIQUE_ID": node.id, "EXTRA_PNGINFO": None}.get(name)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"{text}; {INSTALL}"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
