"""Reads an API-format workflow and changes inputs from the command line. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class WorkflowError(ValueError):
    """What is wrong with a workflow, before anything has run: `problems`, one line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class Node:
    """One node of a workflow; inputs hold values or links [node id, output index]."""

    id: str
    class_type: str
    inputs: dict[str, Any]
    title: str = ""

    @property
    def label(self) -> str:
        """How messages name the node: 'node 3 (KSampler "My sampler")'."""
        title = f' "{self.title}"' if self.title and self.title != self.class_type else ""
        return f"node {self.id} ({self.class_type}{title})"


Workflow = dict[str, Node]


def read_workflow(path: Path) -> Workflow:
    """The nodes of an API-format file by id, in the file's order.

    Raises:
        WorkflowError: no such file, no JSON, the format of ComfyUI's page, or an entry that is no node.
    """
    graph = _json(path)
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise WorkflowError(
            f"{path} is a workflow in the page's format; in ComfyUI choose 'Workflow > Export (API)' and run that file"
        )
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict):
        graph = graph["prompt"]
    if not isinstance(graph, dict) or not graph:
        raise WorkflowError(f"{path} holds no nodes; an API-format workflow is {{id: {{class_type, inputs}}, ...}}")
    problems = [line for key, entry in graph.items() for line in _entry_problems(path, key, entry)]
    if problems:
        raise WorkflowError(*problems)
    return {key: _node(key, entry) for key, entry in graph.items()}


def override(workflow: Workflow, settings: Iterable[str]) -> list[tuple[str, str]]:
    """Applies NODE.INPUT=VALUE settings in place; whether the node has such an input is checked by `graph.plan`.

    NODE is an id, else a title, else a class that only one node has. VALUE is JSON if it parses, else a string.

    Returns:
        (node id, input) of each setting.

    Raises:
        WorkflowError: a setting of another form, or a node that there is not, or not only once; all of them at once.
    """
    problems, changed = [], []
    for setting in settings:
        target, equals, text = setting.partition("=")
        name, dot, entry = target.rpartition(".")
        if not (equals and dot and name and entry):
            problems.append(f"--set {setting}: write it as NODE.INPUT=VALUE, e.g. --set 3.seed=42")
            continue
        found = _targets(workflow, name)
        if len(found) == 1:
            found[0].inputs[entry] = _value(text)
            changed.append((found[0].id, entry))
        else:
            problems.append(_target_problem(workflow, f"--set {setting}", name, found))
    if problems:
        raise WorkflowError(*problems)
    return changed


def named(workflow: Workflow, names: Iterable[str]) -> list[str]:
    """Ids of the nodes that are named, each by its id, else its title, else a class that only one node has.

    Raises:
        WorkflowError: a node that there is not, or not only once; all of them at once.
    """
    found = {name: _targets(workflow, name) for name in names}
    problems = [
        _target_problem(workflow, f"--only {name}", name, nodes) for name, nodes in found.items() if len(nodes) != 1
    ]
    if problems:
        raise WorkflowError(*problems)
    return [node.id for nodes in found.values() for node in nodes]


def as_prompt(workflow: Mapping[str, Node]) -> dict[str, Any]:
    """The workflow as ComfyUI's PROMPT: what saved images carry, --set values included."""
    return {
        node.id: {"inputs": node.inputs, "class_type": node.class_type}
        | ({"_meta": {"title": node.title}} if node.title else {})
        for node in workflow.values()
    }


def closest(word: str, words: Iterable[Any], shown: int = 3) -> str:
    """The few words most like `word`, quoted; the first ones where none is like it; "" where there are none."""
    known = [str(w) for w in words]
    by_folded = {w.lower(): w for w in known}
    near = [by_folded[w] for w in get_close_matches(word.lower(), by_folded, n=shown, cutoff=0.5)]
    return ", ".join(repr(w) for w in near or known[:shown])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkflowError(f"there is no workflow file {path}; give the path of an API-format .json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WorkflowError(f"the workflow {path} cannot be read ({error}); give an API-format .json") from error
    except json.JSONDecodeError as error:
        raise WorkflowError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error


def _entry_problems(path: Path, key: str, entry: Any) -> list[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_type"), str):
        return [f"{path}: entry '{key}' has no class_type; an API-format node is {{class_type, inputs}}"]
    if not isinstance(entry.get("inputs", {}), dict):
        return [f"{path}: the inputs of node {key} ({entry['class_type']}) are not an object of names and values"]
    return []


def _node(key: str, entry: Mapping[str, Any]) -> Node:
    meta = entry.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else ""
    return Node(key, entry["class_type"], dict(entry.get("inputs", {})), title if isinstance(title, str) else "")


def _targets(workflow: Workflow, name: str) -> list[Node]:
    if name in workflow:
        return [workflow[name]]
    titled = [node for node in workflow.values() if node.title == name]
    return titled or [node for node in workflow.values() if node.class_type == name]


def _target_problem(workflow: Workflow, option: str, name: str, found: list[Node]) -> str:
    if found:
        return f"{option}: {len(found)} nodes are called {name!r}; name one by its id: " + ", ".join(
            node.id for node in found
        )
    names = dict.fromkeys(w for node in workflow.values() for w in (node.id, node.title, node.class_type) if w)
    near = closest(name, names, 5)
    return f"{option}: the workflow has no node {name!r} (by id, title or class); closest: {near}"


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
