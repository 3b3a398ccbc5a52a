"""Where everything is on the page: groups in rows, in each a note on top and columns by depth in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .declared import Declared, declared

Box = tuple[int, int, int, int]
"""Left, top, width and height in the page's units; top without the title bar."""

TITLE = 30
_WIDTH, _WIDE, _SLOT, _WIDGET, _TEXT = 330, 400, 24, 33, 130
_GAP, _PAD, _HEAD, _PAGE, _TALL = 60, 30, 50, 3800, 1500
_FOOT = 60
"""Room for what the page writes below a node."""
_NOTE_WIDTH, _LETTER, _LINE = 360, 8, 24
_SHOWS: dict[str, int] = {
    **dict.fromkeys(("SaveImage", "PreviewImage", "LoadImage"), 300),
    "Diff2FlowTrain": 540,
    "Diff2FlowReflowPairs": 120,
}
"""Further height of nodes that show something: images, the progress of a run."""
_PREVIEWS = {name: 240 for name in ("Diff2FlowStepsGrid", "Diff2FlowSampler", "Diff2FlowDepth", "KSampler")}
"""The same of those under which ComfyUI draws what they sample meanwhile."""


def columns_of(graph: Mapping[str, Any], members: Sequence[str]) -> list[list[str]]:
    """The members of a group in columns: each node right of all members that it needs."""
    depth: dict[str, int] = {}

    def find(node: str) -> int:
        if node not in depth:
            needed = [link[0] for link in graph[node]["inputs"].values() if is_link(link) and link[0] in members]
            depth[node] = 1 + max(map(find, needed), default=-1)
        return depth[node]

    columns: list[list[str]] = [[] for _ in range(1 + max(map(find, members)))]
    for node in members:
        columns[depth[node]].append(node)
    return [part for column in columns for part in _parts(graph, column)]


def _parts(graph: Mapping[str, Any], column: Sequence[str]) -> list[list[str]]:
    """A column as several of about one height, none of them too high."""
    heights = [_height(graph[node]["class_type"]) + TITLE + _GAP for node in column]
    fair = sum(heights) / -(-sum(heights) // _TALL)
    parts: list[list[str]] = [[]]
    used = 0
    for node, height in zip(column, heights, strict=True):
        if parts[-1] and used + height / 2 > fair:
            parts, used = [*parts, []], 0
        parts[-1].append(node)
        used += height
    return parts


@dataclass(frozen=True)
class Placed:
    """Boxes of a group, of its note, and of its members by id."""

    group: Box
    note: Box
    members: Mapping[str, Box]

    def moved(self, x: int, y: int) -> Placed:
        """The same elsewhere."""
        members = {node: _moved(box, x, y) for node, box in self.members.items()}
        return Placed(_moved(self.group, x, y), _moved(self.note, x, y), members)


def placed(graph: Mapping[str, Any], groups: Sequence[tuple[Sequence[str], str]]) -> list[Placed]:
    """Groups (ids of the members, text of the note) in rows from left to right, as wide as a page allows."""
    found: list[Placed] = []
    x = y = lowest = 0
    for members, note in groups:
        here = _group(graph, members, note)
        _, _, width, height = here.group
        if x and x + width > _PAGE:
            x, y = 0, lowest + _GAP
        found.append(here.moved(x, y))
        x, lowest = x + width + _GAP, max(lowest, y + height)
    return found


def _group(graph: Mapping[str, Any], members: Sequence[str], note: str) -> Placed:
    """A group whose corner is 0, 0."""
    columns = columns_of(graph, members)
    widths = [max(_width(graph[node]["class_type"]) for node in column) for column in columns]
    inside = max(_NOTE_WIDTH, sum(widths) + _GAP * (len(widths) - 1))
    note_box = (_PAD, _HEAD + TITLE, inside, 60 + _LINE * -(-len(note) * _LETTER // inside))
    top, x, boxes = note_box[1] + note_box[3] + _GAP, _PAD, {}
    for column, width in zip(columns, widths, strict=True):
        y = top
        for node in column:
            height = _height(graph[node]["class_type"])
            boxes[node] = (x, y, width, height)
            y += height + TITLE + _GAP
        x += width + _GAP
    bottom = max(y + height for _, y, _, height in boxes.values())
    return Placed((0, 0, inside + 2 * _PAD, bottom + _PAD), note_box, boxes)


def _moved(box: Box, x: int, y: int) -> Box:
    return (box[0] + x, box[1] + y, *box[2:])


def is_link(value: Any) -> bool:
    """Whether an input's value is [node id, output index]."""
    return isinstance(value, list)


def _width(class_type: str) -> int:
    return _WIDE if _texts(declared(class_type)) or class_type in _SHOWS else _WIDTH


def _height(class_type: str) -> int:
    node = declared(class_type)
    rows = max(len(node.inputs) - len(node.widgets), len(node.outputs))
    widgets = sum(1 + len(entry.followers) for entry in node.widgets) - _texts(node)
    shown = _SHOWS.get(class_type, 0) + _PREVIEWS.get(class_type, 0)
    return _FOOT + _SLOT * rows + _WIDGET * widgets + _TEXT * _texts(node) + shown


def _texts(node: Declared) -> int:
    return sum(bool(entry.options.get("multiline")) for entry in node.widgets)
