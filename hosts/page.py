"""What the page is told of the running nodes, kept for a page that comes later, and what it asks of them."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMMANDS = ("save", "stop")
_PLACES, _STEPS, _PICTURES = 8, 1200, 24
_KEPT = {"validation": 400, "picture": _PICTURES}
"""How many entries of a kind are kept beside the steps; of any other kind the last one."""
_ENDS = ("end", "failed")
_NAMELESS = "00000000-0000-0000-0000-000000000000"
"""Id of a graph that has none of its own yet, as ComfyUI's page makes it; it gets another one when it is reloaded."""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a node stands: its id in the graph ("5:3" for node 3 inside subgraph 5), and its workflow's id or ""."""

    node: str
    workflow: str = ""

    def __post_init__(self) -> None:
        if self.workflow == _NAMELESS:
            object.__setattr__(self, "workflow", "")


class _Steps:
    """At most _STEPS entries, evenly over the run however long it becomes, and always the newest."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._every, self._seen = 1, 0

    def add(self, entry: Entry) -> None:
        """Keeps an entry in place of the newest, where that one was not one to stay."""
        if self._seen % self._every != 1 % self._every:
            self.entries.pop()
        self.entries.append(entry)
        self._seen += 1
        if len(self.entries) > _STEPS:
            self.entries, self._every = self.entries[::2], 2 * self._every


class _Story:
    """The entries of one node, bounded."""

    def __init__(self) -> None:
        self.name, self.running, self.command = "", False, ""
        self.pictures: OrderedDict[int, bytes] = OrderedDict()
        self._steps = _Steps()
        self._kinds: dict[str, deque[Entry]] = {}

    def add(self, entry: Entry) -> None:
        """Keeps an entry; a run that begins anew forgets the one before, one that goes on does not."""
        kind = entry["kind"]
        if kind == "begin":
            self._begin(entry)
        elif kind in _ENDS:
            self.running, self.command = False, ""
        if kind == "step":
            self._steps.add(entry)
        else:
            self._kinds.setdefault(kind, deque(maxlen=_KEPT.get(kind, 1))).append(entry)

    def keep(self, number: int, picture: bytes) -> None:
        """Keeps a picture by the number of its entry, and forgets the oldest."""
        self.pictures[number] = picture
        while len(self.pictures) > _PICTURES:
            self.pictures.popitem(last=False)

    def since(self, number: int) -> list[Entry]:
        """Entries after that number, in their order."""
        entries = itertools.chain(self._steps.entries, *self._kinds.values())
        return sorted((entry for entry in entries if entry["seq"] > number), key=lambda entry: entry["seq"])

    def _begin(self, entry: Entry) -> None:
        name = entry.get("name", "")
        if not entry.get("step") or name != self.name:
            self._kinds.clear()
            self.pictures.clear()
            self._steps = _Steps()
        for kind in (*_ENDS, "saved", "phase", "status", "note"):
            self._kinds.pop(kind, None)
        self.name, self.running, self.command = name, True, ""


class Board:
    """The stories of the nodes that ran last. Safe between threads: one runs the nodes, another answers the page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stories: OrderedDict[Place, _Story] = OrderedDict()
        self._numbers = itertools.count(time.time_ns() // 1_000_000)  # rises over a restart of the server as well

    def tell(self, place: Place, entry: Entry, picture: bytes | None = None) -> dict[str, Any]:
        """Keeps an entry, and its picture (JPEG) where it has one; the entry as the page gets it."""
        with self._lock:
            number = next(self._numbers)
            told = {"node": place.node, "workflow": place.workflow, "seq": number, **entry}
            story = self._stories.setdefault(place, _Story())
            self._stories.move_to_end(place)
            story.add(told)
            if picture is not None:
                story.keep(number, picture)
            while len(self._stories) > _PLACES:
                self._stories.popitem(last=False)
        return told

    def history(self, place: Place, after: int = 0) -> dict[str, Any]:
        """{"entries": those after that number, "running": whether its run hears commands, "known": whether it ran}.

        What is not known ran before the server was started, or long ago.
        """
        with self._lock:
            story = self._story(place)
            entries, running = (story.since(after), story.running) if story else ([], False)
            return {"entries": entries, "running": running, "known": story is not None}

    def picture(self, place: Place, number: int) -> bytes | None:
        """The picture of the entry with that number, while it is kept."""
        with self._lock:
            story = self._story(place)
            return story.pictures.get(number) if story else None

    def ask(self, place: Place, command: str) -> bool:
        """Asks the run for something of COMMANDS; False where no run is on that could hear it.

        Raises:
            ValueError: another command.
        """
        if command not in COMMANDS:
            raise ValueError(f"command must be one of {', '.join(COMMANDS)}, not {command!r}")
        with self._lock:
            story = self._story(place)
            if story is None or not story.running:
                return False
            story.command = "stop" if story.command == "stop" else command
            return True

    def asked(self, place: Place) -> str:
        """What was asked since the last call, or ""."""
        story = self._stories.get(place)
        if story is None or not story.command:  # every step comes here: no lock while nothing was asked
            return ""
        with self._lock:
            command, story.command = story.command, ""
            return command

    def _story(self, place: Place) -> _Story | None:
        """That place's, else the one whose workflow had no id: queued without a page, or not by this name yet."""
        return self._stories.get(place) or self._stories.get(Place(place.node))


board = Board()
"""The one of this process."""
