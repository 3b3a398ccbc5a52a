"""What the nodes say about themselves, in the form of ComfyUI's locales.

`python -m diff2flow_nodes.nodes.texts` writes the English locale from the node classes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .. import hosts

LOCALES = Path(__file__).resolve().parent.parent / "locales"


class _NoFiles:
    """A host that lists no files, for INPUT_TYPES."""

    def names(self, kind: str) -> list[str]:
        return []

    def directory(self, kind: str) -> Path:
        return Path(kind, "of no files")


def english() -> dict[str, Any]:
    """Names, descriptions and tooltips of all nodes, as `nodeDefs.json` has them."""
    from . import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    return {name: node_texts(node, NODE_DISPLAY_NAME_MAPPINGS[name]) for name, node in NODE_CLASS_MAPPINGS.items()}


def node_texts(node: type, display_name: str) -> dict[str, Any]:
    """Name, description, inputs and outputs of one node."""
    outputs = zip(getattr(node, "RETURN_NAMES", node.RETURN_TYPES), node.OUTPUT_TOOLTIPS, strict=True)
    return {
        "display_name": display_name,
        "description": node.DESCRIPTION,
        "inputs": {name: _named(name, options["tooltip"]) for name, (_, options) in node_inputs(node).items()},
        "outputs": {str(index): _named(name, tooltip) for index, (name, tooltip) in enumerate(outputs)},
    }


def node_inputs(node: type, groups: Collection[str] = ("required", "optional")) -> dict[str, Any]:
    """The declarations of a node's inputs of some groups, whatever the host."""
    before = list(hosts._chosen)
    hosts.use(_NoFiles())
    try:
        found = node.INPUT_TYPES()
    finally:
        hosts._chosen[:] = before
    return {name: declared for group in groups for name, declared in found.get(group, {}).items()}


def _named(name: str, tooltip: str) -> dict[str, str]:
    return {"name": name, "tooltip": tooltip}


def as_json(texts: dict[str, Any]) -> str:
    """The text of a locale file."""
    return json.dumps(texts, ensure_ascii=False, indent=2) + "\n"


def main() -> None:
    """Writes the English locale."""
    path = LOCALES / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(english()), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
