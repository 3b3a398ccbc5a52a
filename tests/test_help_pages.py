"""ComfyUI's in-app help: a page for each node, that says what the node's inputs and outputs are."""

from __future__ import annotations

import re

import pytest
from help_pages import (
    DOCS,
    SECTIONS,
    choices_of,
    described,
    drawn,
    input_heads,
    output_head,
    outputs_of,
    page_of,
    sections_of,
)

from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from diff2flow_nodes.nodes.texts import node_inputs

NAMES = sorted(NODE_CLASS_MAPPINGS)
WIDEST_LINE = 50
"""Characters of a graph's line: the side panel is narrow."""


def test_every_node_has_a_page_and_every_page_a_node() -> None:
    assert sorted(path.stem for path in DOCS.glob("*.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_page_has_the_usual_parts(name: str) -> None:
    page = sections_of(page_of(name))
    assert tuple(page) == ("", *SECTIONS)
    title, what = page[""].split("\n", 1)
    assert title == f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}"
    assert 1 <= len(re.findall(r"\.(?:\s|$)", what.replace("1.x", "").replace("2.x", ""))) <= 3, "two sentences"
    assert page["Good to know"].startswith("- ")


@pytest.mark.parametrize("name", NAMES)
def test_page_describes_every_input_and_no_other(name: str) -> None:
    found = described(sections_of(page_of(name))["Inputs"])
    assert list(found) == input_heads(NODE_CLASS_MAPPINGS[name])
    assert all(len(text) > 15 for text in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_page_explains_every_choice(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    texts = described(sections_of(page_of(name))["Inputs"]).values()
    for key, text in zip(node_inputs(node), texts, strict=True):
        unnamed = [option for option in choices_of(key, node) if not re.search(rf"\b{re.escape(option)}\b", text)]
        assert not unnamed, f"{key}: {unnamed}"


@pytest.mark.parametrize("name", NAMES)
def test_page_describes_every_output_and_no_other(name: str) -> None:
    outputs = outputs_of(NODE_CLASS_MAPPINGS[name])
    assert list(described(sections_of(page_of(name))["Outputs"])) == [output_head(*output) for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_page_shows_the_node_in_a_graph(name: str) -> None:
    graph = sections_of(page_of(name))["In the graph"]
    assert graph.startswith("```\n") and graph.endswith("\n```")
    into, shown, out_of = drawn(graph)
    node = NODE_CLASS_MAPPINGS[name]
    assert shown == NODE_DISPLAY_NAME_MAPPINGS[name]
    assert into <= set(node_inputs(node)) and out_of and out_of <= {key for key, _ in outputs_of(node)}
    assert max(len(line) for line in graph.splitlines()) <= WIDEST_LINE


@pytest.mark.parametrize("name", NAMES)
def test_page_names_only_what_exists(name: str) -> None:
    page = re.sub("default `.*?`", "", page_of(name))
    nodes = "|".join(sorted(NODE_DISPLAY_NAME_MAPPINGS.values(), key=len, reverse=True))
    named = re.findall(r"Diff2Flow [A-Z]\w+", re.sub(nodes, "", page))
    assert not named, f"no such node: {named}"
    known = {key for node in NODE_CLASS_MAPPINGS.values() for key in node_inputs(node)}
    unknown = [word for word in re.findall(r"`([a-z]+_[a-z_]+)`", page) if word not in known | _choices()]
    assert not unknown, f"no such input or choice: {unknown}"


def _choices() -> set[str]:
    nodes = NODE_CLASS_MAPPINGS.values()
    return {option for node in nodes for key in node_inputs(node) for option in choices_of(key, node)}
