"""A run that is killed (SIGKILL) at random moments, again and again: what it loses, and what it becomes."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diff2flow_nodes.tests import killed_run
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.state import states_in

KILLS = 20


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes forked from one that has imported everything: they train a few milliseconds after their start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diff2flow_nodes.tests.killed_run"])
    return context


def _trained(processes: Any, folder: Path, save_every: int) -> dict[str, torch.Tensor]:
    """The LoRA of a run that nobody kills."""
    process = processes.Process(target=killed_run.train, args=(folder, save_every))
    process.start()
    process.join()
    assert process.exitcode == 0
    return load_lora(folder / "loras" / "style.safetensors")[0]


def _entries(run: Path) -> list[dict[str, Any]]:
    """The whole lines of the log."""
    log = run / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [json.loads(line) for line in lines]


def _last(run: Path, kind: str) -> int:
    return max((entry["step"] for entry in _entries(run) if entry["kind"] == kind), default=0)


def _begins(run: Path, since: float) -> list[int]:
    """The steps at which sittings began that the log has since a time."""
    return [entry["step"] for entry in _entries(run) if entry["kind"] == "begin" and entry["time"] > since]


def _wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def _parts(folder: Path) -> int:
    return len(list(folder.rglob("*.part")))


def test_a_run_killed_twenty_times_loses_at_most_what_was_not_saved(tmp_path: Path, processes: Any) -> None:
    folder, draw = tmp_path / "killed", random.Random(20)
    whole = _trained(processes, tmp_path / "whole", 0)
    run, reached, resumed, most_parts = folder / "runs" / "style", [], [], 0
    for _ in range(KILLS):
        before, started = _last(run, "step"), time.time()
        process = processes.Process(target=killed_run.train, args=(folder, killed_run.SAVE_EVERY, 0.02))
        process.start()
        if draw.random() < 0.8:  # the rest is killed while it starts, how long that takes depends on the machine
            _wait_for(lambda since=started: _begins(run, since))
        time.sleep(draw.uniform(0.0, 0.4))
        process.kill()
        process.join()
        begins = _begins(run, started)
        resumed += begins
        assert all(begin >= before - killed_run.SAVE_EVERY for begin in begins), (begins, before)
        assert len(states_in(run / "states")) <= killed_run.KEEP + 1
        most_parts = max(most_parts, _parts(folder))
        reached.append(_last(run, "step"))
    print(f"begun at {resumed}, killed at {reached}; at most {most_parts} half-written files")
    assert len(set(resumed)) > KILLS // 2 and reached[-1] < killed_run.STEPS, "the kills did not hit a running run"
    lora = _trained(processes, folder, killed_run.SAVE_EVERY)
    assert lora.keys() == whole.keys() and all(torch.equal(lora[key], whole[key]) for key in whole)
    assert _parts(folder / "runs") == _parts(folder / "loras") == 0 and most_parts <= 3
    assert [path.name for path in (folder / "runs").iterdir()] == ["style"]
    assert [path.name for path in (folder / "loras").iterdir()] == ["style.safetensors"]
    steps = [entry["step"] for entry in _entries(run) if entry["kind"] == "step"]
    assert steps == list(range(1, killed_run.STEPS + 1))
