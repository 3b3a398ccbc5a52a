"""Names that files get: what one of the usual systems does not take is refused on all of them, before any work."""

import os

import pytest

from diff2flow_nodes import files
from diff2flow_nodes.files import confined, free_folder, written_whole
from diff2flow_nodes.hosts import use
from diff2flow_nodes.nodes.datasets import Diff2FlowImages
from diff2flow_nodes.nodes.reflow import Diff2FlowReflowPairs
from diff2flow_nodes.nodes.sharing import Diff2FlowSaveCheckpoint
from diff2flow_nodes.nodes.training import Diff2FlowTrain
from diff2flow_nodes.tests.training_fakes import FakeHost, SilentProgress, TinyBackbone, tiny_job
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.lora_file import free_path, load_lora
from diff2flow_nodes.training.product import Output

DEVICES = ("con", "PRN", "aux.txt", "Nul", "COM1", "lpt9.safetensors", "com¹", "nul .x", "styles/con", "con/ink")
ENDINGS = ("ink.", "ink ", "styles./ink", "styles /ink", "...", "a/ b. ")
CHARACTERS = ("a<b", "a>b", "a:b", 'a"b', "a|b", "a?b", "a*b", "a\nb", "a\tb", "a\x7fb", "a\x85b", "a\ud800b", "a\0b")
NONE = ("", " ", ".", "./", "./.", "a//b")
FINE = (
    "my lora ünï 日本 😀",
    "v1.5.final",
    "console",
    "com10",
    "aux_in",
    "a/./b",
    ".hidden",
    " lead",
    "null",
    "it's (1)",
)


@pytest.mark.parametrize("name", [*DEVICES, *ENDINGS, *CHARACTERS, *NONE])
def test_what_some_system_does_not_take_is_refused_everywhere(tmp_path, name):
    for made in (lambda: confined(tmp_path, name), lambda: Output(tmp_path, name), lambda: free_folder(tmp_path, name)):
        with pytest.raises(ValueError, match=r"(?s)the name .*(;|is not allowed)"):
            made()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FINE)
def test_what_all_systems_take_is_taken(tmp_path, name):
    assert confined(tmp_path, name).is_relative_to(tmp_path)
    with written_whole(free_path(tmp_path, name)) as temporary:
        temporary.write_bytes(b"1")


@pytest.mark.parametrize("letter", ["x", "é", "語", "😀"])
def test_the_longest_name_that_is_taken_can_be_written_and_numbered(tmp_path, letter):
    size = len(letter.encode())
    most = (255 - len(".safetensors") - len("_00002") - len("..12345678.part")) // size
    for folder, taken in ((tmp_path, free_path), (tmp_path / "folders", free_folder)):
        longest = letter * (most if taken is free_path else (255 - 6 - 15) // size)
        for _ in range(2):
            with written_whole(taken(folder, longest)) as temporary:
                temporary.write_bytes(b"1")
        with pytest.raises(ValueError, match=r"too long: it has \d+ bytes .*shorten it"):
            taken(folder, longest + "xxxx")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with pytest.raises(ValueError, match="too long"):
        confined(tmp_path, "x" * 256)


def test_a_run_of_the_longest_name_ends_in_a_file_and_a_longer_one_does_not_begin(tmp_path):
    name = "x" * 222
    made = [_run(tmp_path, name, resume=resume).name for resume in ("auto", "new")]
    assert made == [f"{name}.safetensors", f"{name}_00002.safetensors"]
    assert all(load_lora(tmp_path / "loras" / file) for file in made)
    with pytest.raises(ValueError, match="output_name: .*too long"):
        _run(tmp_path, name + "x")


def _run(folder, name, progress=None, backbone=None, **keeping):
    job = tiny_job(folder, backbone, name=name, steps=2, keeping={"memory_check": False, **keeping})
    return finetune(job, progress or SilentProgress())


def test_a_file_that_could_not_be_written_is_told_before_training(tmp_path):
    backbone = TinyBackbone()
    job = tiny_job(tmp_path, backbone, name="styles/ink")
    (tmp_path / "loras" / "styles").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="output_name: 'ink.safetensors' cannot be written into the folder"):
        finetune(job, SilentProgress())
    assert backbone.batch_sizes == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["con", "ink.", "x" * 256, "a\x7fb"])
def test_nodes_refuse_before_anything_is_loaded(tmp_path, name):
    use(FakeHost(tmp_path))
    for said in (
        Diff2FlowTrain.VALIDATE_INPUTS(name),
        Diff2FlowReflowPairs.VALIDATE_INPUTS(folder=name),
        Diff2FlowImages.VALIDATE_INPUTS(name=name),
        Diff2FlowSaveCheckpoint.VALIDATE_INPUTS(name=name),
    ):
        assert isinstance(said, str) and "the name" in said


def test_a_file_in_use_is_waited_for(tmp_path, monkeypatch):
    target, replace, tries = tmp_path / "ink.safetensors", os.replace, []

    def busy(source, to):
        tries.append(1)
        if len(tries) < 4:
            raise PermissionError(13, "The process cannot access the file")
        replace(source, to)

    monkeypatch.setattr(files.os, "replace", busy)
    target.write_bytes(b"old")
    with written_whole(target) as temporary:
        temporary.write_bytes(b"new")
    assert (
        target.read_bytes() == b"new"
        and len(tries) == 4
        and [path.name for path in tmp_path.iterdir()] == [target.name]
    )


def test_a_lora_that_stays_in_use_gets_another_name_and_that_is_said(tmp_path, monkeypatch, caplog):
    _run(tmp_path, "ink")
    replace = os.replace

    def busy(source, to):
        if str(to).endswith("ink.safetensors"):
            raise PermissionError(13, "The process cannot access the file")
        replace(source, to)

    monkeypatch.setattr(files.os, "replace", busy)
    monkeypatch.setattr(files, "_IN_USE_SECONDS", 0.2)
    job = tiny_job(tmp_path, name="ink", steps=3, keeping={"memory_check": False})
    made = finetune(job, SilentProgress())
    assert made.name == "ink_00002.safetensors" and len(made.losses) == 3
    assert "kept open by another program" in caplog.text and not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    job = tiny_job(tmp_path, name="ink", steps=4, keeping={"memory_check": False})
    assert finetune(job, SilentProgress()).name == "ink_00002.safetensors"  # it goes on with its own
