"""Runs that stop and go on: to the bit what they would have been, whatever the optimizer."""

import json
import signal
from contextlib import closing

import pytest
import torch

from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, tiny_dataset, tiny_job
from diff2flow_nodes.training import finetune as finetuning
from diff2flow_nodes.training.finetune import Watch, finetune
from diff2flow_nodes.training.layers import GROUPS, LoraSettings
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.product import save_product
from diff2flow_nodes.training.run_folder import open_run
from diff2flow_nodes.training.settings import OptimizerSettings
from diff2flow_nodes.training.state import states_in

LORA = LoraSettings(groups=GROUPS, rank=4, alpha=4.0, ends_in_full=True)
EVERYTHING = {
    "objective": ObjectiveSettings(time_distribution="logit_normal", loss="pseudo_huber", caption_dropout=0.3),
    "optimizer": OptimizerSettings(schedule="cosine", warmup_steps=2, ema=0.9, accumulation=2),
}


def _run(folder, progress=None, **options):
    return finetune(tiny_job(folder, lora=LORA, **options), progress or SilentProgress())


def _interrupted(folder, step, **options):
    with pytest.raises(KeyboardInterrupt):
        _run(folder, SilentProgress(step, KeyboardInterrupt()), **options)


def _drawn(model, flow, text):
    return [("4 steps", torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0)))]


def _equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _log(folder, name="style"):
    return [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop", [1, 4, 6])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "schedule_free"])
def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(tmp_path, name, stop):
    rate = 1.0 if name == "prodigy" else 1e-2
    options = {"steps": 7, "learning_rate": rate, "optimizer": OptimizerSettings(name)}
    whole = _run(tmp_path / "whole", **options)
    _interrupted(tmp_path / "halved", stop, **options)
    resumed = _run(tmp_path / "halved", **options)
    assert _equal(whole.state, resumed.state) and whole.losses == resumed.losses
    fresh = tiny_job(tmp_path / "x", lora=LORA, **{**options, "steps": 1})
    assert not _equal(whole.state, finetune(fresh, SilentProgress()).state)


def test_schedule_averages_accumulation_and_drawn_captions_go_on_too(tmp_path):
    options = {"steps": 9, **EVERYTHING}
    whole = _run(tmp_path / "whole", **options)
    for step in (2, 5, 6):
        _interrupted(tmp_path / "halved", step, **options)
    resumed = _run(tmp_path / "halved", **options)
    assert _equal(whole.state, resumed.state) and whole.losses == resumed.losses
    assert [entry["step"] for entry in _log(tmp_path / "halved") if entry["kind"] == "step"] == list(range(1, 10))


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_samples_validation_and_states_change_nothing(tmp_path, name):
    options = {"steps": 6, "optimizer": OptimizerSettings(name, ema=0.5)}
    plain = _run(tmp_path / "plain", **options)
    watch = Watch(2, _drawn, 2, tiny_dataset(tmp_path / "held"))
    watched = _run(tmp_path / "watched", watch=watch, keeping={"save_every": 2}, **options)
    assert _equal(plain.state, watched.state) and plain.losses == watched.losses


def test_a_finished_run_is_not_trained_again_and_more_steps_go_on(tmp_path):
    first = _run(tmp_path, steps=4)
    backbone = TinyBackbone()
    again = _run(tmp_path, backbone=backbone, steps=4, keeping={"memory_check": False})
    assert backbone.batch_sizes == [] and _equal(first.state, again.state) and again.name == "style.safetensors"
    longer = _run(tmp_path, steps=6)
    assert _equal(longer.state, _run(tmp_path / "whole", steps=6).state)
    assert longer.name == "style.safetensors" and len(list((tmp_path / "loras").iterdir())) == 1


def test_other_settings_begin_a_run_of_their_own(tmp_path):
    _run(tmp_path, steps=3)
    other = _run(tmp_path, steps=3, learning_rate=2e-2)
    new = _run(tmp_path, steps=3, keeping={"resume": "new"})
    assert (other.name, new.name) == ("style_00002.safetensors", "style_00003.safetensors")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["style", "style_00002", "style_00003"]
    assert _equal(new.state, load_lora(tmp_path / "loras" / "style.safetensors")[0])


def test_another_dataset_or_model_is_another_run(tmp_path):
    job = tiny_job(tmp_path)
    with closing(open_run(tmp_path / "runs", "style", job.identity(), "auto")) as run:
        pass
    for changed in (tiny_job(tmp_path, dataset=tiny_dataset(tmp_path / "more", count=4)), tiny_job(tmp_path, seed=1)):
        assert changed.identity() != job.identity()
    with closing(open_run(tmp_path / "runs", "style", job.identity(), "auto")) as again:
        assert again.path == run.path  # it never began
        assert open_run(tmp_path / "runs", "style", job.identity(), "new").path != run.path


def test_states_are_written_every_n_steps_and_the_last_k_are_kept(tmp_path):
    _run(tmp_path, steps=7, keeping={"save_every": 2, "keep": 2})
    folder = tmp_path / "runs" / "style" / "states"
    assert [path.name for path in states_in(folder)] == ["state_00000007.safetensors", "state_00000006.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in states_in(folder))


def test_a_damaged_state_is_passed_over(tmp_path, caplog):
    whole = _run(tmp_path / "whole", steps=6)
    _interrupted(tmp_path, 4, steps=6, keeping={"save_every": 2, "keep": 3})
    newest = states_in(tmp_path / "runs" / "style" / "states")[0]
    newest.write_bytes(newest.read_bytes()[:-40])
    resumed = _run(tmp_path, steps=6)
    assert "state_00000004.safetensors cannot be read" in caplog.text
    assert _equal(whole.state, resumed.state) and whole.losses == resumed.losses


def test_an_error_inside_the_update_leaves_the_last_state(tmp_path, monkeypatch):
    whole = _run(tmp_path / "whole", steps=6)

    calls, step = [], torch.optim.AdamW.step

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        _run(tmp_path, steps=6, keeping={"save_every": 2})
    assert states_in(tmp_path / "runs" / "style" / "states")[0].name == "state_00000004.safetensors"
    monkeypatch.undo()
    assert _equal(whole.state, _run(tmp_path, steps=6).state)


def test_the_log_has_what_one_wants_to_see(tmp_path):
    progress = SilentProgress()
    watch = Watch(2, _drawn, 3, tiny_dataset(tmp_path / "held"))
    _run(tmp_path, progress, steps=6, watch=watch)
    entries = _log(tmp_path)
    steps = [entry for entry in entries if entry["kind"] == "step"]
    wanted = {"loss", "learning_rate", "grad_norm", "steps_per_second", "seconds_left", "time"}
    assert len(steps) == 6 and all(wanted <= entry.keys() for entry in steps)
    [first, second] = [entry for entry in entries if entry["kind"] == "validation"]
    assert (first["step"], second["step"]) == (3, 6) and 0 < second["loss"] < 100
    assert sum(name.startswith("loss_t0.") for name in first) == 4
    files = [name for entry in entries if entry["kind"] == "samples" for name in entry["files"]]
    assert files == [f"step_{step:08d}_4_steps.png" for step in (2, 4, 6)]
    assert all((tmp_path / "runs" / "style" / "samples" / name).stat().st_size > 50 for name in files)
    assert {entry["kind"] for entry in progress.events} >= {"begin", "step", "validation", "samples", "end"}


def test_validation_falls_while_the_model_learns_its_own_data(tmp_path):
    dataset = tiny_dataset(tmp_path / "data")
    watch = Watch(validate_every=40, held_out=dataset)
    _run(tmp_path, steps=80, batch_size=8, dataset=dataset, watch=watch)
    first, second = [entry["loss"] for entry in _log(tmp_path) if entry["kind"] == "validation"]
    assert second < 0.9 * first


def test_tensorboard_has_the_scalars(tmp_path):
    _run(tmp_path, steps=2, watch=Watch(tensorboard=True))
    [file] = (tmp_path / "runs" / "style" / "tensorboard").iterdir()
    assert b"step/loss" in file.read_bytes()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(ValueError, match="optimizer 'prodigy' needs the package 'prodigyopt'"):
        _run(tmp_path, optimizer=OptimizerSettings("prodigy"))
    assert list((tmp_path / "loras").iterdir()) == []


def test_resume_must_be_a_known_word(tmp_path):
    with pytest.raises(ValueError, match="resume must be one of auto, new, not 'yes'"):
        _run(tmp_path, keeping={"resume": "yes"})


def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(tmp_path, monkeypatch):
    whole = _run(tmp_path / "whole", steps=6)
    calls, step = [], torch.optim.AdamW.step

    def pressed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", pressed)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, steps=6)
    assert states_in(tmp_path / "runs" / "style" / "states")[0].name == "state_00000004.safetensors"
    assert (tmp_path / "loras" / "style.safetensors").exists()
    assert [entry["step"] for entry in _log(tmp_path) if entry["kind"] == "step"] == [1, 2, 3, 4]
    monkeypatch.undo()
    assert _equal(whole.state, _run(tmp_path, steps=6).state)


def test_a_second_ctrl_c_does_not_cut_the_saving_short(tmp_path, monkeypatch):
    def pressed_again(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        return save_product(*args)

    monkeypatch.setattr(finetuning, "save_product", pressed_again)
    _interrupted(tmp_path, 3, steps=6)
    assert states_in(tmp_path / "runs" / "style" / "states")[0].name == "state_00000003.safetensors"
    assert (tmp_path / "loras" / "style.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
