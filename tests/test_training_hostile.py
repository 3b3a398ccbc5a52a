"""Files of a run that somebody else wrote: each is refused or passed over by name, and none leads elsewhere."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from diff2flow_nodes.tests.reflow_fakes import make, maker
from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, tiny_job
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.pairs import MANIFEST, Share
from diff2flow_nodes.training.run_folder import open_run
from diff2flow_nodes.training.shards import DIGEST, content_digest
from diff2flow_nodes.training.state import states_in

DEEP = "[" * 100_000
ABOUT = "diff2flow.state"


def _run(folder, backbone=None, **options):
    return finetune(tiny_job(folder, backbone, keeping={"memory_check": False}, **options), SilentProgress())


def _newest(folder):
    return states_in(folder / "runs" / "style" / "states")[0]


def _rewritten(path, change=lambda tensors, about: None, text=None):
    """A state with other contents; `text` stands for what it says of itself, None for what it says."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[ABOUT])
    tensors = load_file(path)
    change(tensors, about)
    path.unlink()
    save_file(tensors, str(path), {} if text == "" else {ABOUT: json.dumps(about) if text is None else text})


def _set(key, value):
    return lambda tensors, about: about.update({key: value})


def _without(key):
    return lambda tensors, about: about.pop(key)


WRONG_ABOUT = {
    "of a newer version": (_set("version", "99"), None, "made by a newer version of Diff2Flow .*99"),
    "of no version": (_set("version", [1]), None, "its version is"),
    "without optimizer": (_without("optimizer"), None, "'optimizer' is missing"),
    "without step": (_without("step"), None, "'step' is missing"),
    "with a step in words": (_set("step", "three"), None, "'step' is a str"),
    "with another step": (_set("step", 300), None, "losses of the shape"),
    "with an identity of a list": (_set("identity", [1]), None, "'identity' is a list"),
    "with groups of words": (_set("groups", "none"), None, "'groups' is a str"),
    "with an optimizer of words": (_set("optimizer", {"one": {}}), None, "of another form"),
    "with a slot of words": (_set("optimizer", {"0": 3}), None, "of another form"),
    "deep": (lambda *_: None, DEEP, "no JSON"),
    "a list": (lambda *_: None, "[1]", "JSON list"),
    "nothing": (lambda *_: None, "", "no saved state"),
}


@pytest.mark.parametrize("how", WRONG_ABOUT)
def test_a_state_that_says_something_else_is_passed_over_by_name(tmp_path, caplog, how):
    change, text, reason = WRONG_ABOUT[how]
    whole = _run(tmp_path / "whole", steps=4)
    _run(tmp_path, steps=3)
    _rewritten(_newest(tmp_path), change, text)
    made = _run(tmp_path, steps=4)
    assert made.losses == whole.losses  # begun anew, beside it
    assert re.search(rf"state_00000003.safetensors cannot be read \(.*{reason}", caplog.text)


def _reshaped(name, value):
    return lambda tensors, about: tensors.update({name: value})


WRONG_TENSORS = {
    "of another shape": (
        _reshaped("parameter/00000", torch.zeros(3)),
        "number 0 of its trained layers is float32 .3,.",
    ),
    "of another kind": (
        lambda tensors, about: tensors.update({"parameter/00001": tensors["parameter/00001"].half()}),
        "number 1 of its trained layers is float16",
    ),
    "too many": (_reshaped("parameter/00099", torch.zeros(3)), "and the run"),
    "with averages": (_reshaped("average/00000", torch.zeros(3)), "it has 1 averages and the run 0"),
    "with other moments": (_reshaped("optimizer/0/exp_avg", torch.zeros(3)), "optimizer has other shapes"),
    "with a moment of no layer": (_reshaped("optimizer/4711/exp_avg", torch.zeros(3)), "a layer 4711"),
    "with other groups": (_set("groups", [{"params": [0]}]), "other groups of layers"),
    "with a group of words": (_set("groups", ["unet"]), "optimizer's settings are none"),
    "with a rate of words": (
        lambda tensors, about: [group.update(lr="fast") for group in about["groups"]],
        "optimizer's 'lr' is 'fast'",
    ),
    "with a scale of words": (lambda tensors, about: about["scaler"].update(scale="much"), "gradient scale"),
}


@pytest.mark.parametrize("how", WRONG_TENSORS)
def test_a_state_of_other_tensors_is_refused_by_name_and_nothing_of_it_is_taken(tmp_path, how):
    change, reason = WRONG_TENSORS[how]
    _run(tmp_path, steps=3)
    _rewritten(_newest(tmp_path), change)
    backbone = TinyBackbone()
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"saved state 'state_00000003.safetensors' does not have .*{reason}.*delete it"
    ):
        _run(tmp_path, backbone, steps=4)
    assert backbone.batch_sizes == []
    assert all(torch.equal(value, before[name]) for name, value in backbone.module.state_dict().items())
    assert len(_run(tmp_path, steps=4, name="other").losses) == 4


def _about_run(folder, **facts):
    path = folder / "runs" / "style" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.mark.parametrize("product", ["../victim.txt", "{folder}/victim.txt", "..\\victim.txt", "precious.safetensors",
                                     "style/../precious.safetensors", "style_1.safetensors", "", None])  # fmt: skip
def test_run_json_leads_to_no_other_file(tmp_path, product, caplog):
    _run(tmp_path, steps=2)
    victims = [tmp_path / "victim.txt", *((tmp_path / "loras" / name) for name in ("precious.safetensors",))]
    for victim in victims:
        victim.write_text("precious")
    _about_run(tmp_path, product=product and product.format(folder=tmp_path))
    made = _run(tmp_path, steps=3)
    assert all(victim.read_text() == "precious" for victim in victims)
    assert made.name == "style_00002.safetensors" and (tmp_path / "loras" / made.name).is_file()
    assert not product or "says that its file is" in caplog.text


@pytest.mark.parametrize("text", [DEEP, "[1, 2]", "{", "null", '{"identity": 3}', '{"identity": {}, "product": 3}',
                                  '{"identity": {}, "version": 99, "product": "style.safetensors"}'])  # fmt: skip
def test_a_run_json_of_another_form_is_named_and_not_used(tmp_path, text, caplog):
    _run(tmp_path, steps=2)
    (tmp_path / "runs" / "style" / "run.json").write_text(text)
    made = _run(tmp_path, steps=3)
    assert made.name == "style_00002.safetensors" and len(made.losses) == 3
    assert "run.json of the run 'style' is not used" in caplog.text


@pytest.mark.parametrize("line", ['{"kind": "step", "step": "two"}', "[1]", DEEP, '{"kind": "step"}', '{"step": null}'])
def test_a_line_of_the_log_that_is_none_is_left_out(tmp_path, line):
    _run(tmp_path, steps=2)
    log = tmp_path / "runs" / "style" / "log.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    _run(tmp_path, steps=3)
    steps = [entry["step"] for entry in map(json.loads, log.read_text().splitlines()) if entry["kind"] == "step"]
    assert steps == [1, 2, 3]


def test_one_process_a_run(tmp_path):
    identity = {"made": "here"}
    with_it = f"""
import sys, time
from pathlib import Path
from diff2flow_nodes.training.run_folder import open_run
run = open_run(Path({str(tmp_path)!r}), "style", {identity!r}, "auto")
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", with_it], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        half = tmp_path / "style" / ".state.123.part"
        half.write_text("being written by the other")
        said = f"the run 'style' is trained at this moment by process {other.pid} on .* .since .*; wait"
        with pytest.raises(ValueError, match=said):
            open_run(tmp_path, "style", identity, "auto")
        assert half.exists()
        assert open_run(tmp_path, "style", identity, "new").path.name == "style_00002"
        other.kill()
    run = open_run(tmp_path / "x", "style", identity, "auto")
    again = open_run(tmp_path / "x", "style", {"made": "there"}, "auto")
    assert run.path != again.path
    run.close()
    with_its = open_run(tmp_path, "style_00002", identity, "auto")  # what a killed process held is free
    assert with_its.path.name == "style_00002"


def test_a_run_lets_go_when_it_ends(tmp_path):
    for steps in (2, 3):
        assert len(_run(tmp_path, steps=steps).losses) == steps


def test_one_process_a_share_of_pairs(tmp_path):
    whole = make(tmp_path / "whole", 6)
    folder = tmp_path / "pairs"
    one = make(folder, 6, share=Share(1, 2))
    with one.store.lock(Share(2, 2)):
        said = rf"folder: shard 2 of 2 of the pairs in 'pairs' is made at this moment by process {os.getpid()} on"
        with pytest.raises(ValueError, match=said):
            make(folder, 6, share=Share(2, 2))
        assert len(make(folder, 6, share=Share(1, 2), by=maker(network=None))) == 3  # nothing is missing: it only reads
        assert len(make(folder, 8, share=Share(1, 2))) == 4
    assert make(folder, 6, share=Share(2, 2)).captions is not None
    assert torch.equal(make(folder, 6).batch(range(6)).latent, whole.batch(range(6)).latent)


def _shard(folder, **changes):
    """The only shard of pairs, with other contents of the right checksum."""
    from safetensors import safe_open

    [path] = folder.glob("pairs-*")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), **changes}
    path.unlink()
    save_file(tensors, str(path), {**metadata, DIGEST: content_digest(sorted(tensors.items()))})
    return path.name


BYTES = {"captions": torch.tensor(list(b'["a"]'), dtype=torch.uint8)}
WRONG_SHARDS = {
    "fewer captions": BYTES,
    "no captions": {"captions": torch.tensor(list(b"[1, 2, 3, 4]"), dtype=torch.uint8)},
    "more pairs": {"pairs": torch.tensor([0, 1, 9])},
    "backwards": {"pairs": torch.tensor([0, -1, 4])},
    "many": {"pairs": torch.tensor([0, 1, 1 << 60])},
    "whole numbers": {"latents": torch.zeros(4, 4, 4, 4, dtype=torch.int64)},
    "flat": {"latents": torch.zeros(4, 4)},
    "no noise": {"noise_begins": torch.zeros(4, 3)},
}


@pytest.mark.parametrize("how", WRONG_SHARDS)
def test_a_shard_of_another_form_is_named_and_made_again(tmp_path, how):
    whole = make(tmp_path / "whole", 4)
    make(tmp_path / "pairs", 4)
    name = _shard(tmp_path / "pairs", **WRONG_SHARDS[how])
    with pytest.raises(ValueError, match=f"damaged is 'refuse' .* {name}"):
        make(tmp_path / "pairs", 4, damaged="refuse")
    again = make(tmp_path / "pairs", 4)
    assert torch.equal(again.batch(range(4)).latent, whole.batch(range(4)).latent)


def test_a_record_of_another_form_is_looked_up_again(tmp_path):
    make(tmp_path, 4)
    [shard] = tmp_path.glob("pairs-*")
    stat = shard.stat()
    for facts in ([], ["x", 0, 1], ["x", 0, 0, 4], ["x", 0, 1, "4"], {}, None):
        record = {shard.name: [stat.st_size, stat.st_mtime_ns, facts]}
        (tmp_path / "verified.json").write_text(json.dumps(record))
        assert len(make(tmp_path, 4, damaged="refuse", by=maker(network=None))) == 4
    (tmp_path / "verified.json").write_text(DEEP)
    assert len(make(tmp_path, 4, damaged="refuse", by=maker(network=None))) == 4


def test_a_manifest_of_a_newer_version_says_so(tmp_path):
    make(tmp_path / "pairs", 2)
    manifest = tmp_path / "pairs" / MANIFEST
    about = json.loads(manifest.read_text())
    assert about["version"] == 1
    manifest.write_text(json.dumps({**about, "version": 2}))
    with pytest.raises(ValueError, match="'pairs/manifest.json' cannot be read .*made by a newer version of Diff2Flow"):
        make(tmp_path / "pairs", 2)
