"""Node classes by id: the core nodes, and ours, which are imported only when a workflow has a node that is not core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

from .core_nodes import NODES
from .workflow import WorkflowError

INSTALL = "install what is missing with pip install 'diff2flow-nodes[headless]'"


class NodeClasses(Mapping[str, type]):
    """Class id -> class. Looking up a core id imports nothing.

    Args:
        load_own: gives the classes that are not core, when one is first asked for.
    """

    def __init__(self, load_own: Callable[[], Mapping[str, type]]) -> None:
        self._core = {cls.__name__: cls for cls in NODES}
        self._load_own = load_own

    def __getitem__(self, name: str) -> type:
        return self._core[name] if name in self._core else self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self._core])

    def __len__(self) -> int:
        return len(self._core) + len(self._own)

    @cached_property
    def _own(self) -> Mapping[str, type]:
        try:
            return self._load_own()
        except ImportError as error:
            raise WorkflowError(f"Diff2Flow's nodes cannot be imported ({error}); {INSTALL}") from error
