"""Which files the nodes of this process have written, so that a graph whose file is gone runs again.

ComfyUI takes the outputs of an unchanged node from its memory and does not run it, whatever became of its file. It
asks IS_CHANGED before each prompt: `lost` is a number that grows when a file is found to be gone, and stays as it is
when the node has written another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class _Written:
    inputs: Mapping[str, Any]
    paths: tuple[Path, ...]
    is_lost: bool = False


_written: dict[str, list[_Written]] = defaultdict(list)


def written(node: str, inputs: Mapping[str, Any], paths: Iterable[Path]) -> None:
    """Keeps in mind what a node has written.

    Args:
        node: id of its class.
        inputs: that it was written for; what is no widget's value does not count.
        paths: files, or folders with all that is in them now; one that is gone is enough.
    """
    widgets = {name: value for name, value in inputs.items() if isinstance(value, (str, int, float))}
    kept = [each for each in _written[node] if each.is_lost or each.inputs != widgets]
    _written[node] = [*kept, _Written(widgets, tuple(each for path in paths for each in _files(path)))]


def lost(node: str, inputs: Mapping[str, Any]) -> int:
    """How often what a node has written for such inputs was found to be gone.

    Args:
        node: id of its class.
        inputs: as IS_CHANGED gets them, None where they are linked: those match any.
    """
    matching = [each for each in _written[node] if _match(inputs, each.inputs)]
    for each in matching:
        each.is_lost = each.is_lost or not all(path.exists() for path in each.paths)
    return sum(each.is_lost for each in matching)


def _files(path: Path) -> list[Path]:
    """The path, and for a folder the files in it, without those that are only there while something is written."""
    inside = path.rglob("*") if path.is_dir() else ()
    return [path, *(each for each in inside if each.is_file() and not each.name.startswith("."))]


def _match(inputs: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return all(value is None or before.get(name, value) == value for name, value in inputs.items())
