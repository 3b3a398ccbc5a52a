"""The templates' files: up to date, the same in both formats, complete, and laid out so that they can be read."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tomllib
from page_format import VIRTUAL, prompt_of
from PIL import Image

from diff2flow_nodes import hosts
from diff2flow_nodes.bench.templates import FOLDER, api_graph
from diff2flow_nodes.bench.templates.__main__ import written
from diff2flow_nodes.bench.templates.declared import Input, completed, declared
from diff2flow_nodes.bench.templates.layout import TITLE
from diff2flow_nodes.bench.templates.page import page
from diff2flow_nodes.bench.templates.pictures import SIZE, THUMBNAILS, Strip, thumbnail, tiles_of
from diff2flow_nodes.bench.templates.words import TEMPLATES, Group, Template
from diff2flow_nodes.hosts.headless import HeadlessHost, core_nodes
from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS
from diff2flow_nodes.nodes.texts import node_inputs

CLASSES = {**{core.__name__: core for core in core_nodes.NODES}, **NODE_CLASS_MAPPINGS}
TESTED = {
    "Diff2FlowCheckpointLoader": "test_comfy_host.py",
    "Diff2FlowSolver": "inside_comfy.py",
    "Diff2FlowSigmas": "comfy_graphs.py",
    "Diff2FlowEvaluate": "test_evaluate_node.py",
    "Diff2FlowLoadDepth": "test_depth_file_nodes.py",
    "Diff2FlowDepthMetrics": "test_depth_file_nodes.py",
    "Diff2FlowSaveCheckpoint": "test_share_checkpoint.py",
    "Diff2FlowExportDiffusers": "test_share_diffusers.py",
}
"""Node classes that no template uses, and the file of the tests that does."""
FILES = ("ckpt_name", "lora_name", "image")
MACHINES = re.compile(r"/(home|root|tmp|Users)/|[A-Z]:\\|\.\.")


@pytest.fixture(autouse=True)
def host(tmp_path: Path) -> Any:
    before = list(hosts._chosen)
    hosts.use(HeadlessHost(tmp_path / "models", tmp_path / "input", tmp_path / "output"))
    yield
    hosts._chosen[:] = before


def page_of(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_each_template_has_its_files() -> None:
    for pattern in ("*.json", "*.jpg", "api/*.json"):
        assert {file.stem for file in FOLDER.glob(pattern)} == set(TEMPLATES), pattern


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_page_is_what_the_writer_writes(name: str) -> None:
    told = "run python -m diff2flow_nodes.bench.templates"
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == written(name), told


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_page_is_the_api_graph(name: str) -> None:
    assert prompt_of(page_of(name), CLASSES) == completed(api_graph(name))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_input_is_known_set_and_within_its_limits(name: str) -> None:
    for entry in api_graph(name).values():
        known = node_inputs(CLASSES[entry["class_type"]])
        required = set(node_inputs(CLASSES[entry["class_type"]], ("required",)))
        assert required <= set(entry["inputs"]) <= set(known)
        for widget in declared(entry["class_type"]).widgets:
            value = entry["inputs"].get(widget.name)
            if not isinstance(value, list | None) and widget.name not in FILES:
                assert _fits(widget, known[widget.name][0], value), f"{entry['class_type']}.{widget.name} = {value!r}"


def _fits(widget: Input, kind: Any, value: Any) -> bool:
    if widget.type == "COMBO":
        return value in kind
    if widget.type in ("INT", "FLOAT"):
        low, high = widget.options.get("min", value), widget.options.get("max", value)
        return isinstance(value, (int, float) if widget.type == "FLOAT" else int) and low <= value <= high
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[widget.type])


@pytest.mark.parametrize("name", TEMPLATES)
def test_nodes_and_links_are_counted_and_known(name: str) -> None:
    shown = page_of(name)
    ids, links = [node["id"] for node in shown["nodes"]], [link[0] for link in shown["links"]]
    assert len(set(ids)) == len(ids) and max(ids) == shown["last_node_id"]
    assert links == list(range(1, shown["last_link_id"] + 1))
    assert {node["type"] for node in shown["nodes"]} <= {*CLASSES, *VIRTUAL}
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    for node in shown["nodes"]:
        ours = node["type"] in NODE_CLASS_MAPPINGS
        assert node["type"] in VIRTUAL or node["properties"]["cnr_id"] == (project if ours else "comfy-core")


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_lies_on_anything_else(name: str) -> None:
    shown = page_of(name)
    boxes = [_with_title(node) for node in shown["nodes"]]
    groups = [group["bounding"] for group in shown["groups"]]
    for members in (boxes, groups):
        assert not [pair for pair in combinations(members, 2) if _overlap(*pair)]
    for box in boxes:
        assert sum(_inside(box, group) for group in groups) == 1


def _with_title(node: dict[str, Any]) -> list[float]:
    (left, top), (width, height) = node["pos"], node["size"]
    return [left, top - TITLE, width, height + TITLE]


def _overlap(a: list[float], b: list[float]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def _inside(a: list[float], b: list[float]) -> bool:
    return all(b[i] <= a[i] and a[i] + a[i + 2] <= b[i] + b[i + 2] for i in (0, 1))


@pytest.mark.parametrize("name", TEMPLATES)
def test_links_run_from_left_to_right_within_a_group(name: str) -> None:
    shown = page_of(name)
    places = {node["id"]: node["pos"] for node in shown["nodes"]}
    group_of = {
        node["id"]: number
        for number, group in enumerate(shown["groups"])
        for node in shown["nodes"]
        if _inside(_with_title(node), group["bounding"])
    }
    for _, source, _, target, *_ in shown["links"]:
        assert group_of[source] != group_of[target] or places[source][0] < places[target][0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_groups_are_numbered_and_say_what_to_do(name: str) -> None:
    for number, group in enumerate(TEMPLATES[name].groups, 1):
        assert group.title.startswith(f"{number}. ") and 1 <= group.note.count(". ") + 1 <= 4
    assert "**Run**" in " ".join(group.note for group in TEMPLATES[name].groups)


@pytest.mark.parametrize("name", TEMPLATES)
def test_notes_speak_of_nodes_and_inputs_that_there_are(name: str) -> None:
    """What is *slanted* is a node or a template; what is `code` an input, a choice or a folder."""
    graph = api_graph(name)
    titles = {entry["_meta"]["title"] for entry in graph.values()}
    names = {declared(class_type).name for class_type in NODE_CLASS_MAPPINGS}
    inputs = {entry["class_type"]: node_inputs(CLASSES[entry["class_type"]]) for entry in graph.values()}
    words = {word for known in inputs.values() for word in known} | {"control_after_generate"}
    words |= {
        choice for known in inputs.values() for kind, *_ in known.values() if isinstance(kind, list) for choice in kind
    }
    words |= {"input", "models/loras", "{red|blue}"}
    for group in TEMPLATES[name].groups:
        slanted = set(re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", group.note))
        assert slanted <= titles | names | set(TEMPLATES)
        assert set(re.findall(r"`([^`]+)`", group.note)) <= words


def test_no_path_of_a_machine() -> None:
    for file in FOLDER.rglob("*.json"):
        found = [text for text in re.findall(r'"[^"]*"', file.read_text(encoding="utf-8")) if MACHINES.search(text)]
        assert not found, f"{file.name}: {found}"


def test_what_is_unknown_or_not_in_one_group_is_said() -> None:
    graph = {"1": {"class_type": "PreviewImage", "inputs": {}, "_meta": {"title": "A"}}}
    for titles in ((), ("A", "A"), ("A", "B")):
        with pytest.raises(ValueError, match=f"in one group.*{titles[-1] if titles else 'A'}"):
            page("x", graph, Template((Group("1. All", "Press **Run**.", titles),)))
    graph["1"]["class_type"] = "Unknown"
    with pytest.raises(KeyError, match="Unknown"):
        page("x", graph, Template((Group("1. All", "Press **Run**.", ("A",)),)))


def test_every_node_is_used_by_a_template_or_a_test() -> None:
    used = {entry["class_type"] for name in TEMPLATES for entry in api_graph(name).values()}
    for class_type in NODE_CLASS_MAPPINGS:
        if class_type not in used:
            test = Path(__file__).parent / TESTED[class_type]
            assert class_type in test.read_text(encoding="utf-8"), f"{test.name} does not use {class_type}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_thumbnail_is_small_and_of_its_size(name: str) -> None:
    file = FOLDER / f"{name}.jpg"
    picture = Image.open(file)
    assert picture.format == "JPEG" and picture.size == (400, 300) and file.stat().st_size < 60_000
    assert len(picture.getcolors(400 * 300)) > 50


def test_a_thumbnail_is_composed_of_tiles(tmp_path: Path) -> None:
    table = Image.new("RGB", (128, 64), "red")
    table.paste(Image.new("RGB", (64, 64), "blue"), (64, 0))
    table.save(tmp_path / "table.png")
    tiles = tiles_of(Strip("a", "x", "table.png", columns=(1,)), tmp_path)
    picture = thumbnail([("one", tiles), ("two", tiles)])
    colours = {colour for _, colour in picture.getcolors(400 * 300)}
    assert picture.size == SIZE and (0, 0, 255) in colours and (255, 0, 0) not in colours
    assert set(THUMBNAILS) == set(TEMPLATES)
