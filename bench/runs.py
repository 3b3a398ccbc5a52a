"""Results of many runs, a file each: an interrupted report goes on where it was, several processes can share it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import written_whole

log = logging.getLogger(__name__)


class Runs:
    """The runs of one setting.

    Args:
        folder: of their files.
        setting: a dataclass; runs of others are left alone.
    """

    def __init__(self, folder: Path, setting: Any) -> None:
        self._folder = folder
        self.setting: dict[str, Any] = json.loads(json.dumps(asdict(setting)))

    def make(self, methods: Iterable[str], seeds: Iterable[int], run: Callable[[str, int], dict[str, Any]]) -> None:
        """Runs every method and seed that is not done yet, seed after seed.

        Args:
            methods, seeds: of the runs.
            run: makes the result of a method and seed.
        """
        wanted = list(methods)
        for method, seed in ((method, seed) for seed in seeds for method in wanted):
            if f"{method}/{seed}" not in self.done():
                result = {"setting": self.setting, "name": f"{method}/{seed}", "result": run(method, seed)}
                write_json(self._folder / f"{method} {seed}.json", result)
                log.info("%s", json.dumps(result))

    def done(self) -> dict[str, dict[str, Any]]:
        """The results by "method/seed"."""
        files = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._folder.glob("*.json")))
        return {found["name"]: found["result"] for found in files if found["setting"] == self.setting}


def run_name(method: str, seed: int, setting: Any) -> str:
    """Name of a run's LoRA, without its ending: another setting's never answers to it.

    Args:
        method, seed: of the run.
        setting: a dataclass, of the run.
    """
    mark = hashlib.sha256(json.dumps(asdict(setting)).encode()).hexdigest()[:6]
    return f"{method.replace(', ', '_').replace(' ', '_')}_{seed}_{mark}"


def require_equal_parts(steps: int, parts: int) -> None:
    """ValueError for steps of a training that cannot be split into so many equal parts."""
    if parts < 1 or steps % parts:
        raise ValueError(f"{steps} steps cannot be split into {parts} equal parts")


def ends_of_parts(steps: int, parts: int) -> range:
    """How many steps of a training are done after each of so many equal parts; the last is all."""
    return range(steps // parts, steps + 1, steps // parts)


def write_json(path: Path, what: Any) -> None:
    """Writes JSON, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(what, indent=1), encoding="utf-8")
