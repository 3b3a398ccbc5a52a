"""What a node class declares, as ComfyUI's page sees it: sockets, widgets and their order, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...hosts.headless import core_nodes
from ...nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from ...nodes.texts import node_inputs

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_SEEDS = ("seed", "noise_seed")
_NO_DEFAULT: dict[str, Any] = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "COMBO": None}


@dataclass(frozen=True)
class Input:
    """One input of a node.

    Args:
        name: as workflows have it.
        type: socket type; COMBO for a choice among names.
        optional: whether it may be left open.
        options: default, limits and the like.
    """

    name: str
    type: str
    optional: bool
    options: dict[str, Any]

    @property
    def is_widget(self) -> bool:
        """Whether it is set on the node itself."""
        return self.type in WIDGETS and not self.options.get("forceInput")

    @property
    def default(self) -> Any:
        """What a new node has there."""
        return self.options.get("default", _NO_DEFAULT.get(self.type))

    @property
    def followers(self) -> tuple[str, ...]:
        """Values of the widgets that the page puts behind this one."""
        drawn_anew = self.options.get("control_after_generate")
        if self.type == "INT" and (self.name in _SEEDS if drawn_anew is None else drawn_anew):
            return ("fixed",)
        return ("image",) if self.options.get("image_upload") else ()


@dataclass(frozen=True)
class Declared:
    """A node class: its inputs in the order of the page's widgets, and (name, type) of its outputs."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]

    @property
    def sockets(self) -> list[Input]:
        """Inputs in the order of the page's slots: first those that are no widgets."""
        return sorted(self.inputs, key=lambda entry: entry.is_widget)

    @property
    def widgets(self) -> list[Input]:
        """Inputs that are set on the node."""
        return [entry for entry in self.inputs if entry.is_widget]


@lru_cache
def declared(class_type: str) -> Declared:
    """What a node of the pack or a core node declares.

    Raises:
        KeyError: another node.
    """
    node = {**{core.__name__: core for core in core_nodes.NODES}, **NODE_CLASS_MAPPINGS}[class_type]
    names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    optional = node_inputs(node, ("optional",))
    inputs = (_input(name, entry, name in optional) for name, entry in node_inputs(node).items())
    display_name = NODE_DISPLAY_NAME_MAPPINGS.get(class_type, class_type)
    return Declared(display_name, tuple(inputs), tuple(zip(names, node.RETURN_TYPES, strict=True)))


def completed(graph: Mapping[str, Any]) -> dict[str, Any]:
    """An API graph as the page exports it: every widget that it leaves out at its default."""
    return {
        node: {**entry, "inputs": {**_defaults(entry["class_type"]), **entry["inputs"]}}
        for node, entry in graph.items()
    }


def _defaults(class_type: str) -> dict[str, Any]:
    return {widget.name: widget.default for widget in declared(class_type).widgets}


def _input(name: str, entry: tuple[Any, ...], optional: bool) -> Input:
    kind, options = entry[0], entry[1] if len(entry) > 1 else {}
    return Input(name, kind if isinstance(kind, str) else "COMBO", optional, options)
