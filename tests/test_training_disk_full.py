"""Disks that are full in turn: what has room is saved, and what has none is said, with the folder and what is kept."""

import errno
import logging
import os

import pytest
import torch
from small_disk import SmallDisk

from diff2flow_nodes.tests.reflow_fakes import make, maker
from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, tiny_job
from diff2flow_nodes.training import checkpoint_file
from diff2flow_nodes.training.finetune import Watch, finetune
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.record import JsonLines
from diff2flow_nodes.training.state import State, load_state, save_state, states_in


def _run(folder, progress=None, save_every=2, keep=2, **options):
    job = tiny_job(folder, keeping={"save_every": save_every, "keep": keep, "memory_check": False}, **options)
    return finetune(job, progress or SilentProgress())


def _states(folder):
    return [int(path.stem[-8:]) for path in states_in(folder / "runs" / "style" / "states")]


def _steps(folder, name="style"):
    return int(load_lora(folder / "loras" / f"{name}.safetensors")[1]["ss_steps"])


def _state_size(tmp_path):
    _run(tmp_path / "measured", steps=6)
    return states_in(tmp_path / "measured" / "runs" / "style" / "states")[0].stat().st_size


def _said(progress):
    return [text for _, text in progress.updates if "no room" in text]


def test_a_disk_with_room_for_one_state_does_not_end_the_run(tmp_path, monkeypatch):
    size, progress = _state_size(tmp_path), SilentProgress()
    disk = SmallDisk(monkeypatch, tmp_path / "runs", int(1.6 * size))
    made = _run(tmp_path, progress, steps=6)
    assert len(made.losses) == 6 and _steps(tmp_path) == 6 and _states(tmp_path) == [2]
    assert [event["name"] for event in progress.events if event["kind"] == "saved"] == ["style.safetensors"]
    states = disk.folder / "style" / "states"
    for step, text in zip((4, 6), _said(progress), strict=True):
        assert f"the state of step {step} is not saved" in text and f"{step} steps are saved as 'style.saf" in text
        assert f"in the folder '{states}'" in text and "kB are free" in text
        assert "the state of step 2 is kept there" in text
    assert not list(tmp_path.rglob("*.part"))


def test_older_states_make_room_but_never_the_newest(tmp_path, monkeypatch):
    size = _state_size(tmp_path)
    SmallDisk(monkeypatch, tmp_path / "runs", int(2.7 * size))
    _run(tmp_path, steps=8, keep=9, save_every=1)
    kept = _states(tmp_path)
    assert kept[:2] == [8, 7] and kept == list(range(8, 8 - len(kept), -1)) and len(kept) < 8


def test_states_are_removed_only_where_that_makes_room(tmp_path, monkeypatch):
    folder = tmp_path / "states"
    disk = SmallDisk(monkeypatch, folder, 1 << 30)
    for step in (1, 2, 3):
        save_state(folder, _state(step, 10), {}, {}, 9)
    disk.capacity = disk.used
    with pytest.raises(ValueError, match=r"needs 10\.0 MB; the state of step 3 is kept there"):
        save_state(folder, _state(4, 2_500_000), {}, {}, 9)
    assert [path.name[-13] for path in states_in(folder)] == ["3", "2", "1"]


def _state(step, size):
    optimizer = {"state": {}, "param_groups": []}
    return State(step, [torch.zeros(size)], [], optimizer, {}, [0.0] * step)


@pytest.mark.parametrize("offset", [0, 4, 300, 40_000])
def test_a_write_that_ends_in_the_middle_leaves_the_states_as_they_were(tmp_path, monkeypatch, offset):
    save_state(tmp_path, _state(1, 20_000), {}, {}, 2)
    monkeypatch.setattr(checkpoint_file, "open", lambda path, mode: _Cut(path, mode, offset), raising=False)
    with pytest.raises(ValueError, match="no room for 'state_00000002.safetensors' .*state of step 1 is kept"):
        save_state(tmp_path, _state(2, 20_000), {}, {}, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["state_00000001.safetensors"]
    assert load_state(tmp_path / "state_00000001.safetensors").step == 1


class _Cut:
    """A file that takes so many bytes."""

    def __init__(self, path, mode, room):
        self.file, self.room = open(path, mode), room  # noqa: SIM115  (closed by __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(bytes(data)[: self.room])
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_the_disk_of_loras_is_full_the_state_is_kept_and_goes_on_to_the_file(tmp_path, monkeypatch):
    disk = SmallDisk(monkeypatch, tmp_path / "loras", 100)
    with pytest.raises(ValueError, match="the LoRA of 5 steps is not saved: there is no room for 'style.safetens") as e:
        _run(tmp_path, save_every=0)
    assert f"in the folder '{tmp_path / 'loras'}'" in str(e.value) and "queue again" in str(e.value)
    assert f"the state of step 5 is kept in '{tmp_path / 'runs' / 'style' / 'states'}'" in str(e.value)
    assert list(disk.folder.iterdir()) == [] and _states(tmp_path) == [5]
    disk.capacity, backbone = 1 << 30, TinyBackbone()
    again = _run(tmp_path, backbone=backbone, save_every=0)
    assert backbone.batch_sizes == [] and again.name == "style.safetensors" and _steps(tmp_path) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("something else")])
def test_a_run_that_ends_early_saves_what_has_room(tmp_path, monkeypatch, error, caplog):
    SmallDisk(monkeypatch, tmp_path / "runs", 3000)
    with pytest.raises(type(error)) as ended:
        _run(tmp_path, SilentProgress(3, error), save_every=0)
    assert _steps(tmp_path) == 3 and _states(tmp_path) == []
    told = str(ended.value) if isinstance(error, ValueError) else caplog.text
    assert "the state of step 3 is not saved" in told and "3 steps are saved as 'style.safetensors'" in told


def test_both_disks_are_full(tmp_path, monkeypatch):
    SmallDisk(monkeypatch, tmp_path, 9_000)
    with pytest.raises(
        ValueError, match="LoRA of 5 steps is not saved: .*; the state of step 5 is not saved: .*no ear"
    ):
        _run(tmp_path, save_every=0)


def test_every_moment_of_saving_saves_both(tmp_path):
    with pytest.raises(_Gone):
        _run(tmp_path, steps=9, watch=Watch(sample_every=5, draw=_gone))
    assert _steps(tmp_path) == 4 and _states(tmp_path)[0] == 4


class _Gone(BaseException):
    """The process ends here, as far as the run can tell."""


def _gone(model, flow, text):
    import diff2flow_nodes.training.finetune as finetuning

    finetuning._Session._rescue = lambda *_: None
    raise _Gone


@pytest.fixture(autouse=True)
def _rescued(monkeypatch):
    import diff2flow_nodes.training.finetune as finetuning

    monkeypatch.setattr(finetuning._Session, "_rescue", finetuning._Session._rescue)


def test_samples_without_room_are_left_out_and_said(tmp_path, monkeypatch):
    def drawn(model, flow, text):
        SmallDisk(monkeypatch, tmp_path / "runs" / "style" / "samples", 10)
        return [("1 step", torch.zeros(1, 8, 8, 3))]

    progress = SilentProgress()
    assert len(_run(tmp_path, progress, watch=Watch(sample_every=4, draw=drawn)).losses) == 5
    [said] = [text for text in _said(progress) if "samples of step 4 are left out" in text]
    assert f"in the folder '{tmp_path / 'runs' / 'style' / 'samples'}'" in said


def test_a_log_without_room_ends_no_training(tmp_path, caplog):
    log = JsonLines(tmp_path / "log.jsonl", 0)
    log._file.close()
    log._file = _Full()
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.add({"kind": "step", "step": step})
            log.flush()
        log.close()
    assert caplog.text.count("has gaps") == 1


class _Full:
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = close = lambda self: self.write("")


def test_pairs_without_room_say_so_and_go_on_later(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole", 6)
    texts = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("texts-*/*"))
    disk = SmallDisk(monkeypatch, tmp_path / "pairs", texts + 1500)
    with pytest.raises(ValueError, match=f"no room for 'pairs-.*' in the folder '{disk.folder}' .*are free there"):
        make(disk.folder, 6)
    assert not list(disk.folder.glob("*.part"))
    disk.capacity = 1 << 30
    again = make(disk.folder, 6, by=maker())
    assert torch.equal(again.batch(range(6)).latent, whole.batch(range(6)).latent)


def test_a_cache_that_cannot_be_kept_does_not_matter(tmp_path, monkeypatch, caplog):
    make(tmp_path / "pairs", 4)
    for path in (tmp_path / "pairs").glob("pairs-*"):
        os.utime(path, (0, 0))  # what has just been written is not recorded
    disk = SmallDisk(monkeypatch, tmp_path / "pairs", 0)
    disk.capacity = disk.used
    assert len(make(tmp_path / "pairs", 4, by=maker(network=None))) == 4
    assert "verified.json cannot be written" in caplog.text
