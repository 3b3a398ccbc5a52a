"""Reads ComfyUI's page format as its page does, written apart from the writer: the API prompt of a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VIRTUAL = ("MarkdownNote", "Note")


def prompt_of(page: Mapping[str, Any], classes: Mapping[str, type]) -> dict[str, Any]:
    """The API prompt: widgets_values by the order of INPUT_TYPES, links by the slots of both ends.

    Args:
        page: in the page's format.
        classes: node classes by their names.
    """
    links = {link[0]: link for link in page["links"]}
    nodes = {node["id"]: node for node in page["nodes"]}
    prompt = {}
    for node in page["nodes"]:
        if node["type"] in VIRTUAL:
            continue
        inputs = _widgets(node["widgets_values"], classes[node["type"]].INPUT_TYPES())
        for slot, entry in enumerate(node["inputs"]):
            if entry["link"] is not None:
                _, source, output, target, into, kind = links[entry["link"]]
                assert (target, into) == (node["id"], slot)
                leaving = nodes[source]["outputs"][output]
                assert entry["link"] in leaving["links"] and kind == leaving["type"] == entry["type"]
                inputs[entry["name"]] = [str(source), output]
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": node["title"]}}
    return prompt


def _widgets(values: list[Any], declared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Values by the names of the widgets; control_after_generate and the upload button take one value each."""
    left, found = list(values), {}
    for name, entry in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        kind, options = entry[0], entry[1] if len(entry) > 1 else {}
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            found[name] = left.pop(0)
            if options.get("control_after_generate", name in ("seed", "noise_seed") and kind == "INT"):
                assert left.pop(0) in ("fixed", "randomize")
            if options.get("image_upload"):
                assert left.pop(0) == "image"
    assert not left, f"{left} belong to no widget"
    return found
