"""What a crash can lose of reflow pairs: at most 20 seconds of work, from the first second on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diff2flow_nodes.tests import slow_pairs
from diff2flow_nodes.tests.reflow_fakes import encode, make, maker
from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone
from diff2flow_nodes.training import pairs as pairs_module
from diff2flow_nodes.training import reflow, shards
from diff2flow_nodes.training.pairs import PairStore
from diff2flow_nodes.training.teacher import TeacherSettings

PROMISE = 20.0
KILLS = 3


class Clock:
    """Goes only when it is told to, and knows what is finished and not written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.written, self.longest = 1000.0, 1000.0, 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        write = PairStore.write

        def writes(store: PairStore, run: Any, share: Any) -> None:
            write(store, run, share)
            self.written = self.now

        monkeypatch.setattr(pairs_module.PairStore, "write", writes)

    def go(self, seconds: float) -> None:
        self.now += seconds
        self.longest = max(self.longest, self.now - self.written)


class Costly(TinyBackbone):
    """Every network call costs a while, and more for each item."""

    def __init__(self, clock: Clock, each: float, fixed: float = 0.0) -> None:
        super().__init__()
        self.clock, self.each, self.fixed = clock, each, fixed

    def __call__(self, x_diff: Any, tau: Any, conditioning: Any) -> Any:
        self.clock.go(self.fixed + self.each * len(x_diff) / 2)  # half of them are the negatives
        return super().__call__(x_diff, tau, conditioning)


@pytest.mark.parametrize("asked", [0, 7, 64])
@pytest.mark.parametrize("pair", [0.05, 0.4, 1.7, 5.0, 9.0])
def test_no_moment_has_more_unwritten_work_than_promised(tmp_path, monkeypatch, asked, pair):
    clock = Clock(monkeypatch)
    made = make(tmp_path, 70, by=maker(Costly(clock, pair / 10)), batch_size=asked, teacher=TeacherSettings(10, 2.0))
    assert len(made) == 70 and clock.longest <= PROMISE
    assert clock.now - 1000.0 <= 1.15 * 70 * pair  # and little is made twice for it


def test_a_pair_that_takes_longer_is_written_as_soon_as_it_is_finished(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    make(tmp_path, 5, by=maker(Costly(clock, 6.0)), batch_size=64, teacher=TeacherSettings(10, 2.0))
    assert clock.longest <= 60.0 + 5 * 6.0  # one pair, and the step in which that was found out
    assert len(list(tmp_path.glob("pairs-*"))) == 5


def test_a_batch_that_would_take_too_long_is_given_up_after_its_first_step(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    backbone = Costly(clock, 0.1)  # 8 pairs of 40 steps: 32 s
    make(tmp_path, 20, by=maker(backbone), batch_size=64, teacher=TeacherSettings(40, 2.0))
    assert backbone.batch_sizes[:2] == [2 * 8, 2 * 3] and max(backbone.batch_sizes[1:]) <= 6


def test_a_batch_grows_again_where_more_are_hardly_slower(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    backbone = Costly(clock, 0.001, fixed=0.2)
    make(tmp_path, 200, by=maker(backbone), batch_size=64, teacher=TeacherSettings(10, 2.0))
    assert max(backbone.batch_sizes) == 128 and clock.longest <= PROMISE


def test_prompts_are_on_disk_in_time_too(tmp_path, monkeypatch):
    clock, flush, found = Clock(monkeypatch), shards.ShardStore.flush, []

    def flushed(store: Any) -> None:
        flush(store)
        clock.written = clock.now

    def slow(caption: str) -> Any:
        clock.go(3.0)
        found.append(caption)
        return encode(caption)

    monkeypatch.setattr(shards.ShardStore, "flush", flushed)
    store = shards.ShardStore(tmp_path)
    reflow._encode(store, (f"prompt {i}" for i in range(50)), slow, torch.float32, SilentProgress)
    assert len(found) == 50 and clock.longest <= PROMISE


class Cancelled(BaseException):
    pass


def test_cancel_keeps_what_is_finished_of_the_batch(tmp_path):
    def unequal(caption: str) -> Any:
        return torch.cat([encode(caption)[0]] * (1 + len(caption.split()))), None

    class Cancels(SilentProgress):
        def update(self, done: int, text: str = "", preview: Any = None) -> None:
            super().update(done, text)
            if text.startswith("0 of") and sum(entry["kind"] == "pairs" for entry in self.events) == 5:
                raise Cancelled  # in the second group's second step

    def longer(caption: str) -> Any:
        return torch.cat([encode(caption)[0]] * max(1, len(caption.split())), dim=1), None

    whole = make(tmp_path / "whole", 6, by=maker(encode=longer), batch_size=6)
    with pytest.raises(Cancelled):
        make(tmp_path / "cut", 6, Cancels(), by=maker(encode=longer), batch_size=6)
    backbone = TinyBackbone()
    rest = make(tmp_path / "cut", 6, by=maker(backbone, encode=longer), batch_size=6)
    assert 0 < sum(backbone.batch_sizes) < 6 * 2 * 3  # not all six of three steps again
    torch.testing.assert_close(rest.batch(range(6)).latent, whole.batch(range(6)).latent, atol=2e-3, rtol=0)


def test_killed_from_the_first_second_on_no_work_older_than_the_promise_is_lost(tmp_path):
    """The same with real processes and a real clock, in a tenth of the time."""
    draw, lost = random.Random(8), []
    for number in range(KILLS):
        lost.append(killed(tmp_path / str(number), draw.uniform(0.3, 5.0), slow_pairs.SHORT))
    print(f"seconds of work lost: {[round(seconds, 2) for seconds in lost]}")
    assert max(lost) <= slow_pairs.SHORT


def killed(folder: Path, after: float, promise: float) -> float:
    """Seconds of work that a process loses which is killed so long after its first step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, slow_pairs.__file__, str(folder), str(promise)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        began = float(process.stdout.readline())
        time.sleep(max(0.0, began + after - time.time()))
        os.kill(process.pid, signal.SIGKILL)
        now = time.time()
        process.wait()
    written = [path.stat().st_mtime for path in folder.glob("pairs-*.safetensors")]
    return now - max([began, *written])
