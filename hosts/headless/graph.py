"""Checks a workflow against the node classes and orders it, before anything heavy runs. No torch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from .values import checked, spec_of
from .workflow import Node, Workflow, WorkflowError, closest

logger = logging.getLogger(__name__)

Classes = Mapping[str, type]

_FILES = {"ckpt_name": "checkpoints", "lora_name": "loras", "image": "input"}
"""Inputs that name a file, and the kind of folder it lies in."""


def plan(
    workflow: Workflow,
    classes: Classes,
    folders: Mapping[str, str],
    changed: Iterable[tuple[str, str]] = (),
    only: Collection[str] = (),
) -> list[str]:
    """Ids of the nodes that the output nodes need, each after those it takes from; values are converted in place.

    Args:
        folders: where each kind of file lies, for messages.
        changed: (node id, input) set on the command line; inputs that the node does not have are errors there.
        only: ids of the output nodes that are wanted; all of them if there is none.

    Raises:
        WorkflowError: every problem found, one line each.
    """
    problems = [line for node in workflow.values() for line in _class_problems(node, classes)]
    if problems:
        raise WorkflowError(*problems)
    problems = [line for key, name in changed for line in _unknown_input(workflow[key], name, classes)]
    outputs = [node.id for node in workflow.values() if getattr(classes[node.class_type], "OUTPUT_NODE", False)]
    if not outputs:
        raise WorkflowError("the workflow has no output node (e.g. SaveImage), so there is nothing to run; add one")
    problems += [_no_output(workflow, key, outputs) for key in only if key not in outputs]
    order = _ordered(workflow, [key for key in outputs if not only or key in only])
    for key in order:
        problems += [
            f"{workflow[key].label}, {line}" for line in _node_problems(workflow, workflow[key], classes, folders)
        ]
    if problems:
        raise WorkflowError(*problems)
    return order


def links(node: Node) -> dict[str, tuple[str, int]]:
    """The node's inputs that are links: name -> (node id, output index)."""
    return {name: (str(value[0]), value[1]) for name, value in node.inputs.items() if _is_link(value)}


def declared(cls: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """required, optional and hidden inputs of a node class."""
    types = cls.INPUT_TYPES()
    return dict(types.get("required", {})), dict(types.get("optional", {})), dict(types.get("hidden", {}))


def _is_link(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and isinstance(value[0], (str, int))
    )


def _class_problems(node: Node, classes: Classes) -> list[str]:
    if node.class_type in classes:
        return []
    return [
        f"{node.label}: there is no node class {node.class_type!r} here; closest:"
        f" {closest(node.class_type, classes)} ('python -m diff2flow_nodes nodes' lists all)"
    ]


def _unknown_input(node: Node, name: str, classes: Classes) -> list[str]:
    required, optional, _ = declared(classes[node.class_type])
    known = [*required, *optional]
    if name in known:
        return []
    return [
        f"--set {node.id}.{name}: {node.label} has no input {name!r}; closest: {closest(name, known)}"
        f" (it has {', '.join(known)})"
    ]


def _no_output(workflow: Workflow, key: str, outputs: list[str]) -> str:
    listed = ", ".join(workflow[output].label for output in outputs)
    return f"--only: {workflow[key].label} is no output node, which alone can be asked for; choose of {listed}"


def _ordered(workflow: Workflow, outputs: list[str]) -> list[str]:
    """Depth first from each output, so that one branch is saved before the next begins."""
    order: dict[str, None] = {}
    for output in outputs:
        path: dict[str, Iterator[str]] = {output: _sources(workflow, output)}
        while path:
            current = next(reversed(path))
            source = next((s for s in path[current] if s not in order), None)
            if source is None:
                order[current] = None
                del path[current]
            elif source in path:
                circle = [*list(path)[list(path).index(source) :], source]
                raise WorkflowError(
                    f"the workflow runs in a circle: {' <- '.join(workflow[k].label for k in circle)}; cut a link"
                )
            else:
                path[source] = _sources(workflow, source)
    return list(order)


def _sources(workflow: Workflow, key: str) -> Iterator[str]:
    return (source for source, _ in links(workflow[key]).values() if source in workflow)


def _node_problems(workflow: Workflow, node: Node, classes: Classes, folders: Mapping[str, str]) -> Iterator[str]:
    cls = classes[node.class_type]
    required, optional, _ = declared(cls)
    own_check = _OwnCheck(cls)
    received: dict[str, Any] = {}
    failed = False
    for name, declaration in (required | optional).items():
        if name not in node.inputs:
            if name in required:
                failed = True
                way = f"--set {node.id}.{name}={_example(declaration)}"
                yield f"input {name}: is missing; add it to the node, or give {way}"
            continue
        problem = _input_problem(workflow, node, name, spec_of(declaration), classes, own_check, received)
        if problem:
            failed = True
            yield f"input {name}: {problem}{_where(name, folders) if not isinstance(node.inputs[name], list) else ''}"
    for name in sorted(node.inputs.keys() - (required | optional).keys()):
        logger.warning("%s has no input %r: ignored (it has %s)", node.label, name, ", ".join(required | optional))
    if not failed:
        yield from own_check.problems(node, received)


def _input_problem(
    workflow: Workflow,
    node: Node,
    name: str,
    spec: tuple[Any, Mapping[str, Any]],
    classes: Classes,
    own_check: _OwnCheck,
    received: dict[str, Any],
) -> str:
    """What is wrong with one input that is present, "" if nothing; converts its value in place."""
    value = node.inputs[name]
    if isinstance(value, list):
        return _link_problem(workflow, value, spec[0], classes, own_check.sees_types, received, name)
    try:
        node.inputs[name] = checked(spec, value, limits=not own_check.sees(name))
    except ValueError as error:
        return str(error)
    return ""


def _link_problem(
    workflow: Workflow, link: Any, wanted: Any, classes: Classes, any_type: bool, received: dict[str, Any], name: str
) -> str:
    if not _is_link(link):
        return f'is {link!r}, but a link is [node id, output index], e.g. ["4", 0]'
    source = workflow.get(str(link[0]))
    if source is None:
        return f"is linked to node {link[0]}, which the workflow does not have (its nodes: {', '.join(workflow)})"
    outputs = list(getattr(classes[source.class_type], "RETURN_TYPES", ()))
    listed = ", ".join(f"{i} {_type_name(kind)}" for i, kind in enumerate(outputs)) or "none"
    if not 0 <= link[1] < len(outputs):
        return f"is linked to output {link[1]} of {source.label}, whose outputs are: {listed}"
    received[name] = outputs[link[1]]
    if any_type or _fits(outputs[link[1]], wanted):
        return ""
    return (
        f"takes {_type_name(wanted)}, but output {link[1]} of {source.label} gives {_type_name(outputs[link[1]])};"
        f" its outputs are: {listed}"
    )


def _fits(given: Any, wanted: Any) -> bool:
    if not given != wanted or "*" in (given, wanted):  # noqa: SIM202 (node packs' "any" types overload !=)
        return True
    if isinstance(given, str) and isinstance(wanted, str):
        return set(given.replace(" ", "").split(",")) <= set(wanted.replace(" ", "").split(","))
    return False


def _type_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else "a choice"


def _example(declaration: Any) -> str:
    kind, options = spec_of(declaration)
    if isinstance(kind, (list, tuple)):
        return str(options.get("default", kind[0] if kind else "NAME"))
    return str(options.get("default", "VALUE" if kind in ("INT", "FLOAT", "STRING", "BOOLEAN") else '["ID",0]'))


def _where(name: str, folders: Mapping[str, str]) -> str:
    kind = _FILES.get(name)
    return f" (looked in {folders[kind]})" if kind in folders else ""


class _OwnCheck:
    """A node class's VALIDATE_INPUTS, called as ComfyUI calls it: with those constant inputs that it names."""

    def __init__(self, cls: Any) -> None:
        self._function = getattr(cls, "VALIDATE_INPUTS", None)
        spec = inspect.getfullargspec(self._function) if self._function else None
        self._names = set(spec.args) if spec else set()
        self._all = bool(spec and spec.varkw)
        self.sees_types = "input_types" in self._names

    def sees(self, name: str) -> bool:
        """Whether the node checks this input's limits itself."""
        return self._all or name in self._names

    def problems(self, node: Node, received: Mapping[str, Any]) -> Iterator[str]:
        """What VALIDATE_INPUTS says, as lines."""
        if self._function is None:
            return
        linked = links(node)
        values = {name: value for name, value in node.inputs.items() if name not in linked and self.sees(name)}
        if self.sees_types:
            values["input_types"] = dict(received)
        try:
            answer = self._function(**values)
        except ValueError as error:
            answer = str(error)
        if answer is not True:
            named = ", ".join(name for name in values if name != "input_types")
            yield f"input {named}: {answer or 'the node refuses it'}"
