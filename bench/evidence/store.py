"""Results of stages on disk, a file each: what is done is not measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs import write_json
from .stage import Context, Stage

FORMAT = 1


def settings_of(stage: Stage, context: Context) -> dict[str, Any]:
    """Everything that a stage's result depends on beside the code and the machine, as JSON gives it back."""
    common = {"kind": context.kind, "device": context.device, "seeds": context.seeds if stage.seeded else []}
    return json.loads(json.dumps({**common, **stage.settings(context)}))


class Store:
    """The results of one kind of run.

    Args:
        folder: of their files.
        code: digest of the code, "" where results of any are taken.
    """

    def __init__(self, folder: Path, code: str) -> None:
        self._folder, self._code = folder, code

    def path(self, stage: str) -> Path:
        """The file of a stage."""
        return self._folder / f"{stage}.json"

    def log(self, stage: Stage) -> Path:
        """Where what a stage says goes; its folder is made if need be."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{stage.name}.log"

    def found(self, stage: Stage, context: Context) -> dict[str, Any] | None:
        """A stage's entry, if it has one of these settings and this code, done or failed."""
        entry = self.read(stage.name)
        if entry is None or self._code not in ("", entry["code"]):
            return None
        return entry if entry["settings"] == settings_of(stage, context) else None

    def read(self, name: str) -> dict[str, Any] | None:
        """A stage's entry, of whatever settings."""
        path = self.path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def is_done(self, stage: Stage, context: Context) -> bool:
        """Whether there is a result, so that it is not measured again."""
        return "result" in (self.found(stage, context) or {})

    def keep(self, stage: Stage, context: Context, entry: Mapping[str, Any]) -> None:
        """Writes a stage's entry, whole or not at all."""
        write_json(self.path(stage.name), {**entry, "settings": settings_of(stage, context), "code": self._code})
