"""Writes ComfyUI's page format (what its template browser opens) from an API graph and what the template says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from ...nodes import NODE_CLASS_MAPPINGS
from .declared import Declared, Input, declared
from .layout import Box, is_link, placed
from .words import Template

_OPTIONAL = 7
"""The hollow circle that the page draws for inputs that may be left open."""
_COLOUR = "#3f789e"


def page(name: str, graph: Mapping[str, Any], template: Template) -> dict[str, Any]:
    """A template in ComfyUI's page format.

    Args:
        name: of the template.
        graph: in API format; every node has a title of its own.
        template: groups that hold each node once.

    Raises:
        ValueError: a node that is in no group or in several, or a group with a node that there is not.
    """
    ids = _ids_by_title(graph, template)
    links = _links(graph)
    members = [[ids[title] for title in group.nodes] for group in template.groups]
    places = placed(graph, [(ids, group.note) for ids, group in zip(members, template.groups, strict=True)])
    nodes, groups = {}, []
    for number, (group, place) in enumerate(zip(template.groups, places, strict=True), 1):
        note_id = max(map(int, graph)) + number
        nodes[note_id] = _note(note_id, group.note, place.note)
        for node, box in place.members.items():
            drawn_anew = graph[node]["_meta"]["title"] in template.drawn_anew
            nodes[int(node)] = _node(node, graph[node], links, box, drawn_anew)
        groups.append(_group(number, group.title, place.group))
    return {
        "id": str(uuid5(NAMESPACE_URL, f"diff2flow/{name}")),
        "revision": 0,
        "last_node_id": max(nodes),
        "last_link_id": len(links),
        "nodes": [{**nodes[node], "order": order} for order, node in enumerate(sorted(nodes))],
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def as_json(written: Mapping[str, Any]) -> str:
    """The text of a template's file: a line for each node, link and group."""
    lines = []
    for key, value in written.items():
        if isinstance(value, list) and value:
            entries = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in value)
            lines.append(f' "{key}": [\n{entries}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _ids_by_title(graph: Mapping[str, Any], template: Template) -> dict[str, str]:
    ids = {entry["_meta"]["title"]: node for node, entry in graph.items()}
    grouped = sorted(title for group in template.groups for title in group.nodes)
    if grouped != sorted(entry["_meta"]["title"] for entry in graph.values()):
        wrong = sorted(set(grouped) ^ set(ids)) or [title for title in ids if grouped.count(title) > 1]
        raise ValueError(f"each node must be in one group, by a title of its own; not so: {', '.join(wrong)}")
    return ids


def _links(graph: Mapping[str, Any]) -> list[list[Any]]:
    """[id, from node, from slot, to node, to slot, type] of every link."""
    found = []
    for node, entry in graph.items():
        for slot, socket in enumerate(declared(entry["class_type"]).sockets):
            value = entry["inputs"].get(socket.name)
            if is_link(value):
                source, output = value
                kind = declared(graph[source]["class_type"]).outputs[output][1]
                found.append([len(found) + 1, int(source), output, int(node), slot, kind])
    return found


def _node(
    node: str, entry: Mapping[str, Any], links: Sequence[list[Any]], box: Box, drawn_anew: bool
) -> dict[str, Any]:
    class_type = entry["class_type"]
    known = declared(class_type)
    into = {link[4]: link[0] for link in links if link[3] == int(node)}
    title = entry["_meta"]["title"]
    return {
        "id": int(node),
        "type": class_type,
        "pos": list(box[:2]),
        "size": list(box[2:]),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [_slot(socket, into.get(slot)) for slot, socket in enumerate(known.sockets)],
        "outputs": _outputs(known, [link for link in links if link[1] == int(node)]),
        "title": title,
        "properties": {"Node name for S&R": class_type, "cnr_id": _package(class_type)},
        "widgets_values": _values(known, entry["inputs"], drawn_anew),
    }


def _package(class_type: str) -> str:
    """Where ComfyUI's manager finds the node: its id in the registry."""
    return "diff2flow-nodes" if class_type in NODE_CLASS_MAPPINGS else "comfy-core"


def _slot(socket: Input, link: int | None) -> dict[str, Any]:
    shape = {"shape": _OPTIONAL} if socket.optional else {}
    widget = {"widget": {"name": socket.name}} if socket.is_widget else {}
    return {"name": socket.name, "type": socket.type, **shape, **widget, "link": link}


def _outputs(known: Declared, leaving: Sequence[list[Any]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "type": kind, "links": [link[0] for link in leaving if link[2] == slot]}
        for slot, (name, kind) in enumerate(known.outputs)
    ]


def _values(known: Declared, inputs: Mapping[str, Any], drawn_anew: bool) -> list[Any]:
    """What the node's widgets show, in their order; those that are linked show their default."""
    values: list[Any] = []
    for widget in known.widgets:
        given = inputs.get(widget.name, widget.default)
        values += [widget.default if is_link(given) else given]
        values += ["randomize" if drawn_anew and follower == "fixed" else follower for follower in widget.followers]
    return values


def _note(number: int, text: str, box: Box) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": list(box[:2]),
        "size": list(box[2:]),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "What to do",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _group(number: int, title: str, box: Box) -> dict[str, Any]:
    return {"id": number, "title": title, "bounding": list(box), "color": _COLOUR, "font_size": 24, "flags": {}}
