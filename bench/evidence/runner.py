"""Runs stages: each in a process of its own, several side by side, what takes the time alone, and what failed again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from .provenance import provenance
from .stage import Context, Stage
from .store import Store

log = logging.getLogger(__name__)


def run_all(stages: Sequence[Stage], context: Context, store: Store) -> dict[str, dict[str, Any]]:
    """Measures what is not done yet; the entry of every stage, which has "result" or "error".

    Args:
        stages: with all that they need among them.
        context: of all; workers 0 measures in this process.
        store: of the results.

    Raises:
        ValueError: a stage needs one that is not there, or stages need each other.
    """
    _require_complete(stages)
    queue = [stage for stage in _longest_first(_in_order(stages), context) if not store.is_done(stage, context)]
    if context.workers < 1:
        for stage in queue:
            measure(stage, context, store)
    else:
        _Processes(queue, context, store).run()
    return {stage.name: store.found(stage, context) or _lost(stage) for stage in stages}


def measure(stage: Stage, context: Context, store: Store) -> None:
    """Runs a stage and keeps its result or, where it fails, one line of why.

    Args:
        stage, context, store: see `run_all`.
    """
    began = time.monotonic()
    about = provenance(context, stage)
    try:
        reason = stage.left_out(context) or _missing(stage, store)
        outcome: dict[str, Any] = {"left_out": reason} if reason else {"result": stage.run(context)}
    except Exception as error:  # whatever it is, the others go on, and the report names it
        log.exception("%s failed", stage.name)
        outcome = {"error": _one_line(error)}
    store.keep(stage, context, {"provenance": about, "seconds": round(time.monotonic() - began, 1), **outcome})
    log.info("%s: %s", stage.name, _outcome(outcome))


def _missing(stage: Stage, store: Store) -> str:
    """Why a stage is left out after those it needs; ValueError where one of them failed."""
    for name in stage.needs:
        entry = store.read(name) or {"error": ""}
        if "error" in entry:
            raise ValueError(f"needs '{name}', which failed")
        if "left_out" in entry:
            return f"needs '{name}', which was left out: {entry['left_out']}"
    return ""


class _Processes:
    """The queue, and the processes that are at work.

    Args:
        queue: stages to run.
        context, store: see `run_all`.
    """

    def __init__(self, queue: Sequence[Stage], context: Context, store: Store) -> None:
        self._waiting, self._context, self._store = list(queue), context, store
        self._at_work: dict[Any, Stage] = {}
        self._start = multiprocessing.get_context("spawn").Process

    def run(self) -> None:
        """Until nothing is left; ends what it started when it is interrupted."""
        try:
            while self._waiting or self._at_work:
                for stage in self._ready():
                    self._begin(stage)
                wait([process.sentinel for process in self._at_work])
                self._end_finished()
        finally:
            for process in self._at_work:
                process.terminate()
            for process in self._at_work:
                process.join()

    def _ready(self) -> list[Stage]:
        """Stages that may begin now, out of the queue: one alone, or as many as there are workers free."""
        busy = {stage.name for stage in (*self._waiting, *self._at_work.values())}
        ready = [stage for stage in self._waiting if not busy & set(stage.needs)]
        if any(map(self._alone, self._at_work.values())):
            return []
        alone = [] if self._at_work else [stage for stage in ready if self._alone(stage)]
        free = self._context.workers - len(self._at_work)
        chosen = alone[:1] or [stage for stage in ready if not self._alone(stage)][:free]
        self._waiting = [stage for stage in self._waiting if stage not in chosen]
        return chosen

    def _alone(self, stage: Stage) -> bool:
        """Times of a quick run mean nothing, so that nothing waits for them."""
        return stage.alone and not self._context.quick

    def _begin(self, stage: Stage) -> None:
        minutes = stage.minutes[self._context.kind == "quick"]
        log.info("%s begins: about %g min, says more in %s", stage.name, minutes, self._store.log(stage))
        process = self._start(target=_work, args=(stage, self._context, self._store))
        process.start()
        self._at_work[process] = stage

    def _end_finished(self) -> None:
        for process in [process for process in self._at_work if not process.is_alive()]:
            process.join()
            stage = self._at_work.pop(process)
            if process.exitcode != 0:
                error = f"its process ended with code {process.exitcode} (a negative one is the signal that ended it)"
                about = provenance(self._context, stage)
                self._store.keep(stage, self._context, {"provenance": about, "seconds": 0.0, "error": error})
            entry = self._store.found(stage, self._context) or _lost(stage)
            log.info("%s: %s, %.0f s", stage.name, _outcome(entry), entry["seconds"])


def _work(stage: Stage, context: Context, store: Store) -> None:
    """A process's whole work; all it says, progress bars, too, goes into its log."""
    with open(store.log(stage), "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(context.threads)
    measure(stage, context, store)


def _require_complete(stages: Sequence[Stage]) -> None:
    names = {stage.name for stage in stages}
    for stage in stages:
        if lacking := sorted(set(stage.needs) - names):
            raise ValueError(f"stage '{stage.name}' needs {', '.join(lacking)}: run them, too")


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """Those that others need first."""
    found: list[Stage] = []
    while len(found) < len(stages):
        done = {stage.name for stage in found}
        ready = [stage for stage in stages if stage not in found and not set(stage.needs) - done]
        if not ready:
            circle = sorted({stage.name for stage in stages} - done)
            raise ValueError(f"the stages {', '.join(circle)} need each other in a circle")
        found += ready
    return found


def _longest_first(stages: Sequence[Stage], context: Context) -> list[Stage]:
    """Those first after which most remains to be done one after the other: no worker is left alone with it at the end.

    A stage that others need comes before them, as its own time is added to theirs.
    """
    kind = context.kind == "quick"

    def remaining(stage: Stage) -> float:
        return stage.minutes[kind] + max((remaining(each) for each in stages if stage.name in each.needs), default=0.0)

    return sorted(stages, key=remaining, reverse=True)


def _outcome(entry: Mapping[str, Any]) -> str:
    return entry.get("error") or entry.get("left_out") or "done"


def _lost(stage: Stage) -> Mapping[str, Any]:
    return {"error": "no result was written", "provenance": {}, "seconds": 0.0}


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__
