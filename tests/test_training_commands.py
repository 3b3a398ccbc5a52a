"""What the page asks of a run, and what it hears of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fakes import SilentProgress, tiny_job

from diff2flow_nodes.training import record
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.product import Finetuned
from diff2flow_nodes.training.state import states_in


def run(folder: Path, commands: dict[int, str] | None = None, **options: Any) -> tuple[Finetuned, SilentProgress]:
    progress = SilentProgress()
    progress.commands = commands or {}
    return finetune(tiny_job(folder, **options), progress), progress


def states(folder: Path) -> list[str]:
    return [path.stem for path in states_in(folder / "runs" / "style" / "states")]


def equal(one: Finetuned, two: Finetuned) -> bool:
    return one.losses == two.losses and all(torch.equal(one.state[key], two.state[key]) for key in one.state)


def heard(progress: SilentProgress, *kinds: str) -> list[tuple[str, Any]]:
    return [(entry["kind"], entry.get("step")) for entry in progress.events if entry["kind"] in kinds]


def test_save_now_writes_state_and_lora_at_once_and_changes_nothing(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", steps=6)
    saved, progress = run(tmp_path / "saved", {2: "save"}, steps=6)
    assert equal(whole, saved) and states(tmp_path / "saved") == ["state_00000006", "state_00000002"]
    assert heard(progress, "saved") == [("saved", 2), ("saved", 6)]
    assert [path.name for path in (tmp_path / "saved" / "loras").iterdir()] == ["style.safetensors"]


def test_stop_ends_the_run_as_if_it_were_its_last_step_and_it_goes_on(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", steps=6)
    short, _ = run(tmp_path / "short", steps=3)
    stopped, progress = run(tmp_path / "stopped", {3: "stop"}, steps=6)
    assert stopped.losses == short.losses and stopped.name == "style.safetensors"
    assert states(tmp_path / "stopped") == ["state_00000003"]
    assert heard(progress, "begin", "end", "saved", "failed") == [("begin", 0), ("end", 3), ("saved", 3)]
    resumed, progress = run(tmp_path / "stopped", steps=6)
    assert equal(whole, resumed) and resumed.name == "style.safetensors"
    [earlier] = [entry for entry in progress.events if entry["kind"] == "earlier"]
    assert earlier["steps"] == [1, 2, 3] and earlier["losses"] == short.losses


def test_many_earlier_losses_are_thinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diff2flow_nodes.training.finetune._SHOWN", 2)
    run(tmp_path, {5: "stop"}, steps=6)
    _, progress = run(tmp_path, steps=6)
    [earlier] = [entry for entry in progress.events if entry["kind"] == "earlier"]
    assert earlier["steps"] == [3] and len(earlier["losses"]) == 1


def test_the_page_hears_why_a_run_failed(tmp_path: Path) -> None:
    progress = SilentProgress(raise_at=2, error=RuntimeError("the cat sat on the cable"))
    with pytest.raises(RuntimeError):
        finetune(tiny_job(tmp_path, steps=6), progress)
    assert [kind for kind, _ in heard(progress, "end", "saved", "failed")] == ["end", "saved", "failed"]
    assert progress.events[-1] == {"kind": "failed", "error": "RuntimeError", "message": "the cat sat on the cable"}


def test_steps_are_sent_four_times_a_second_and_the_last_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    progress = SilentProgress()
    events = record.Events(progress)
    for step in range(1, 101):
        now[0] = step * 0.01
        events.add({"kind": "step", "step": step})
    assert [entry["step"] for entry in progress.events] == [1, 26, 51, 76]
    events.add({"kind": "end", "step": 100})
    assert [entry["step"] for entry in progress.events[4:]] == [100, 100]
    events.add({"kind": "end", "step": 100})
    assert len(progress.events) == 7


def test_the_log_has_no_entries_of_the_page_alone(tmp_path: Path) -> None:
    run(tmp_path, {2: "save"}, steps=4)
    log = (tmp_path / "runs" / "style" / "log.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in log} == {"begin", "step", "state", "end"}
