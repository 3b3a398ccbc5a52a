"""The same workflow in one and in several processes: one LoRA, written once; and what happens when one of them ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_graphs import base, ksampler, saved, training
from PIL import Image

from diff2flow_nodes.tests.headless_fixtures import make_checkpoint
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.state import states_in

pytest.importorskip("accelerate")
PACKAGE = "diff2flow_nodes"
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
SECONDS = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path) -> Path:
    """Models and four pictures."""
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    (tmp_path / "models" / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    pictures = tmp_path / "input" / "digits"
    pictures.mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((64, 64, 3), (60 * i, 200, 90), np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"colour {i}")
    return tmp_path


def workflow(steps: int = 3, **changes: Any) -> dict[str, Any]:
    graph = training(base("tiny.safetensors", batch=1), "digits", "shared", steps, save_dtype="fp32", **changes)
    graph["lora"]["inputs"]["rank"] = 4
    graph["sample"] = ksampler(["train", 0], steps=1)
    return saved(graph, "sample", "picture")


def started(place: Path, graph: dict[str, Any], launch: tuple[str, ...] = LAUNCH) -> subprocess.Popen[str]:
    """The run, launched in a session of its own; `launch` is () for one process."""
    file = place / "workflow_api.json"
    file.write_text(json.dumps(graph))
    folders = [f"--{name}={place / name}" for name in ("models", "input", "output")]
    command = [sys.executable, *launch, "-m", PACKAGE, "run", str(file), *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=True)


def ended(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; all of its processes are ended if it hangs."""
    try:
        out, err = run.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        out, err = run.communicate()
        raise AssertionError(f"it did not end in {SECONDS} s:\n{out[-2000:]}\n{err[-3000:]}") from None
    return run.returncode, out, err


def entries(place: Path) -> list[dict[str, Any]]:
    lines = (place / "output" / "diff2flow" / "shared" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def files(place: Path) -> list[str]:
    """Every file but the checkpoint, the pictures and the workflow, with the digests in names left out."""
    found = [path.relative_to(place).as_posix() for kind in ("models", "output") for path in (place / kind).rglob("*")
             if path.is_file() and not path.is_symlink()]  # fmt: skip
    return sorted(found)


def until(run: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits for it; where the run ends before, or takes too long, fails with what the run said."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if run.poll() is not None or time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            raise AssertionError(f"it ended, or nothing came of it in {SECONDS} s:\n{run.communicate()[1][-3000:]}")
        time.sleep(0.05)


def has_steps(place: Path) -> bool:
    log = place / "output" / "diff2flow" / "shared" / "log.jsonl"
    return log.exists() and '"kind": "step"' in log.read_text()


def workers(run: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank."""
    import psutil

    found = {}
    for child in psutil.Process(run.pid).children(recursive=True):
        if "RANK" in (environment := child.environ()):
            found[int(environment["RANK"])] = child.pid
    return found


def test_two_processes_train_what_one_trains(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(place, alone, symlinks=True, dirs_exist_ok=True)
    one, two = ended(started(alone, workflow(), ())), ended(started(place, workflow()))
    assert one[0] == 0 and two[0] == 0, two[2][-3000:]
    name = "models/loras/shared.safetensors"
    first, second = load_lora(alone / name)[0], load_lora(place / name)[0]
    assert first.keys() == second.keys()
    difference = max(float((first[key] - second[key]).abs().max()) for key in first)
    assert difference <= 1e-5, difference
    assert max(float(value.abs().max()) for key, value in first.items() if "lora_up" in key) > 1e-4
    assert files(alone) == files(place)
    assert sorted(one[1].replace(str(alone), "").splitlines()) == sorted(two[1].replace(str(place), "").splitlines())
    assert [entry["step"] for entry in entries(place) if entry["kind"] == "step"] == [1, 2, 3]
    assert two[2].count("Training shared: 100%") == 1


def test_a_batch_that_cannot_be_divided_is_refused(place: Path) -> None:
    code, _, err = ended(started(place, workflow(batch_size=3)))
    assert code != 0
    assert "batch_size (3) must be a multiple of accumulation times processes (1 × 2 = 2)" in err
    assert not (place / "models" / "loras" / "shared.safetensors").exists()


def test_interrupting_the_launcher_saves_and_the_run_goes_on(place: Path) -> None:
    run = started(place, workflow(steps=100000))
    until(run, lambda: has_steps(place))
    os.kill(run.pid, signal.SIGINT)
    code, _, err = ended(run)
    assert code != 0 and "interrupted; what was saved until then is kept" in err, err[-3000:]
    [state] = states_in(place / "output" / "diff2flow" / "shared" / "states")
    step = int(state.stem.removeprefix("state_"))
    lora = place / "models" / "loras" / "shared.safetensors"
    assert lora.exists() and step >= 1 and f"{step} steps are saved as 'shared.safetensors'" in err
    assert not list(place.rglob("*.part"))
    run = started(place, workflow(steps=100000), ())  # other numbers of processes go on, too
    until(run, lambda: any(entry["kind"] == "step" and entry["step"] > step for entry in entries(place)))
    os.kill(run.pid, signal.SIGINT)
    assert ended(run)[0] == 130
    assert [entry["step"] for entry in entries(place) if entry["kind"] == "begin"] == [0, step]


def kill(run: subprocess.Popen[str], rank: int, first: str) -> None:
    """Ends a process by SIGKILL; `first` hears of it first: the "launcher", the "survivor", or "either" as it comes.

    The survivor hears of it by its broken connection, the launcher by looking every 0.1 s; it then sends SIGTERM to the
    survivor. Left alone, both come within a tenth of a second, in either order.
    """
    found = workers(run)
    halted = {"launcher": found[1 - rank], "survivor": run.pid}.get(first)
    if halted:
        os.kill(halted, signal.SIGSTOP)
    os.kill(found[rank], signal.SIGKILL)
    if halted:
        time.sleep(3)
        os.kill(halted, signal.SIGCONT)


@pytest.mark.parametrize("first", ["either", "launcher", "survivor"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_one_process_ends_all(place: Path, rank: int, first: str) -> None:
    """The survivor says why it ends, whether it hears of it by itself or from the launcher; the writer saves."""
    pytest.importorskip("psutil")
    run = started(place, workflow(steps=100000, save_every=5))
    until(run, lambda: has_steps(place))
    kill(run, rank, first)
    began = time.monotonic()
    code, _, err = ended(run)
    assert code != 0 and time.monotonic() - began < 60
    said = "error: " if rank else "error (process 1): "
    assert re.search(re.escape(said) + ".*another process of this run ended", err), err[-3000:]
    if rank:
        assert (place / "models" / "loras" / "shared.safetensors").exists()


def test_accelerate_that_starts_one_process_is_told_of(place: Path) -> None:
    """Without several GPUs it does so, whatever --num_processes says."""
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    code, _, err = ended(started(place, workflow(steps=1), launch))
    assert code == 0 and "accelerate was asked for several processes and started this one only" in err
    assert (place / "models" / "loras" / "shared.safetensors").exists()
