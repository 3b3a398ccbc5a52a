"""What the help page of a node has to say, derived from the node class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diff2flow_nodes.nodes.loading import NO_LORA
from diff2flow_nodes.nodes.texts import node_inputs

DOCS = Path(__file__).resolve().parent.parent / "web" / "docs"
SECTIONS = ("In the graph", "Inputs", "Outputs", "Good to know")


def page_of(name: str) -> str:
    """The help page of a node, by its id."""
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def sections_of(page: str) -> dict[str, str]:
    """The parts of a page by their titles, the one before the first under ''."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))}


def described(section: str) -> dict[str, str]:
    """The lines of a section on inputs or outputs: what each says, by its head."""
    lines = (line.removeprefix("- ").split("): ", 1) for line in section.splitlines())
    return {f"{head})": text for head, text in lines}


def input_heads(node: type) -> list[str]:
    """How the line on each input begins: its name, type, and default; without one, whether it may be left open."""
    optional = node_inputs(node, ("optional",))
    return [_input_head(name, *declared, name in optional) for name, declared in node_inputs(node).items()]


def _input_head(name: str, kind: Any, options: dict[str, Any], optional: bool) -> str:
    default = options.get("default")
    if default is None or not choices_or_type(kind):
        return f"**{name}** ({_kind(kind)}{', optional' if optional else ''})"
    return f"**{name}** ({_kind(kind)}, default {_shown(default)})"


def drawn(graph: str) -> tuple[set[str], str, set[str]]:
    """What a graph picture shows: the inputs that something goes into, the node, the outputs that go somewhere."""
    above, box, below = re.split(r"[┌└]─+[┐┘]", graph)
    return _listed(above, 1), box.strip(" │\n"), _listed(below, 0)


def _listed(part: str, side: int) -> set[str]:
    lines = [line.split(" → ") for line in part.splitlines() if " → " in line]
    return {name.strip() for line in lines for name in line[side].split(",")}


def output_head(name: str, kind: str) -> str:
    """How the line on an output begins: its name and type."""
    return f"**{name}** ({kind})"


def outputs_of(node: type) -> list[tuple[str, str]]:
    """Name and type of each output."""
    return list(zip(getattr(node, "RETURN_NAMES", node.RETURN_TYPES), node.RETURN_TYPES, strict=True))


def choices_or_type(kind: Any) -> Any:
    """The names that can be chosen, without those of files; another type as it is."""
    return kind if isinstance(kind, str) else [name for name in kind if name != NO_LORA]


def choices_of(name: str, node: type) -> list[str]:
    """What can be chosen at an input; nothing for files and for what is no choice."""
    found = choices_or_type(node_inputs(node)[name][0])
    return [] if isinstance(found, str) else found


def _kind(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    return "choice" if choices_or_type(kind) else "file"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, str):
        return f"`{default}`" if default else "empty"
    return f"{default:g}"
