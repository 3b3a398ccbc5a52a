"""The V1 contract of node classes in the headless runner, on nodes that do nothing but take notes."""

import os
import signal
from pathlib import Path

import pytest

from diff2flow_nodes import cli
from diff2flow_nodes.files import written_whole
from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.hosts.headless import written
from diff2flow_nodes.hosts.headless.execute import NodeFailure, execute
from diff2flow_nodes.hosts.headless.graph import plan
from diff2flow_nodes.hosts.headless.workflow import Node, WorkflowError

NOTES = []


@pytest.fixture(autouse=True)
def fresh_notes():
    NOTES.clear()


class Source:
    RETURN_TYPES, FUNCTION = ("THING", "INT"), "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def run(self, name):
        NOTES.append(name)
        return {"ui": {"text": [name]}, "result": (f"thing {name}", 7)}


class Output:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

    @classmethod
    def INPUT_TYPES(cls):
        optional = {"also": ("THING",), "count": ("INT", {"default": 3, "max": 9})}
        return {
            "required": {"thing": ("THING",)},
            "optional": optional,
            "hidden": {"me": "UNIQUE_ID", "graph": "PROMPT", "png": "EXTRA_PNGINFO"},
        }

    def run(self, thing, me, graph, png, also=None, count=3):
        NOTES.append((thing, also, count, me, sorted(graph), png))
        return {"ui": {}}


class Picky:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"thing": (["a", "b"],), "size": ("INT", {"max": 5})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types, size):
        NOTES.append((input_types, size))
        return True if size != 13 else "13 brings bad luck"

    def run(self, thing, size):
        NOTES.append((thing, size))


class Failing(Source):
    def run(self, name):
        raise {"host": HostError, "value": ValueError, "other": RuntimeError}[name]("it  broke\nhere")


CLASSES = {cls.__name__: cls for cls in (Source, Output, Picky, Failing)}


def graph(**nodes):
    return {key: Node(key, class_type, dict(inputs)) for key, (class_type, inputs) in nodes.items()}


def run(workflow):
    execute(workflow, plan(workflow, CLASSES, {}), CLASSES)


def test_each_node_that_an_output_needs_runs_once():
    run(
        graph(
            a=("Source", {"name": "first"}),
            unused=("Source", {"name": "unused"}),
            one=("Output", {"thing": ["a", 0]}),
            two=("Output", {"thing": ["a", 0], "also": ["b", 0], "count": ["b", 1]}),
            b=("Source", {"name": "second"}),
        )
    )
    ids = ["a", "b", "one", "two", "unused"]
    assert [
        "first",
        ("thing first", None, 3, "one", ids, None),
        "second",
        ("thing first", "thing second", 7, "two", ids, None),
    ] == NOTES


def test_validate_inputs_is_asked_as_comfyui_asks_it():
    run(graph(a=("Source", {"name": "x"}), p=("Picky", {"thing": ["a", 1], "size": 9})))
    assert NOTES == [({"thing": "INT"}, 9), "x", (7, 9)]
    with pytest.raises(WorkflowError, match=r"node p \(Picky\), input size: 13 brings bad luck"):
        plan(graph(p=("Picky", {"thing": "a", "size": 13})), CLASSES, {})


@pytest.mark.parametrize("kind, shown", [("host", "it broke here"), ("other", "RuntimeError: it broke here")])
def test_failures_name_the_node_in_one_line(kind, shown):
    with pytest.raises(NodeFailure) as raised:
        run(graph(f=("Failing", {"name": kind}), o=("Output", {"thing": ["f", 0]})))
    assert str(raised.value) == f"node f (Failing): {shown}"


@pytest.mark.parametrize(
    "raised, code",
    [(NodeFailure(Node("1", "X", {}), HostError("x")), 2), (NodeFailure(Node("1", "X", {}), OSError()), 1)],
)
def test_exit_codes_of_failures(monkeypatch, tmp_path, capsys, raised, code):
    assert exit_code(monkeypatch, tmp_path, raised) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_interruptions(monkeypatch, tmp_path, capsys):
    assert exit_code(monkeypatch, tmp_path, KeyboardInterrupt()) == 130
    assert "kept" in capsys.readouterr().err
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(monkeypatch, tmp_path, None) == 143
    assert signal.getsignal(signal.SIGTERM) is before


def exit_code(monkeypatch, tmp_path, raised):
    """The CLI's exit code where running the nodes raises, or where it receives SIGTERM."""

    def running(*_):
        if raised is None:
            os.kill(os.getpid(), signal.SIGTERM)
        raise raised

    monkeypatch.setattr(cli, "execute", running)
    monkeypatch.setattr(cli, "announce", lambda *_: None)
    file = tmp_path / "w.json"
    file.write_text('{"1": {"class_type": "PreviewImage", "inputs": {}}}')
    monkeypatch.setattr(cli, "plan", lambda *_: [])
    return cli.main(["run", str(file), "--output", str(tmp_path / "out")])


def test_missing_packages_are_named_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_PACKAGES", ("torch", "no_such_package"))
    assert exit_code(monkeypatch, tmp_path, KeyboardInterrupt()) == 2
    assert "no_such_package" in capsys.readouterr().err


def test_files_are_told_of_as_they_appear(tmp_path):
    told = []
    written.announce(told.append, tmp_path / "out")
    for folder in ("out", "elsewhere"):
        with written_whole(tmp_path / folder / "deep" / "a.txt") as path:
            path.write_text("x")
    (tmp_path / "out" / "b").touch()
    os.rename(tmp_path / "out" / "b", tmp_path / "out" / "c")
    assert told == [Path(tmp_path / "out" / "deep" / "a.txt")]


class NeedsAll(Source):
    """Takes what a checkpoint may lack."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}, "optional": {"clip": ("CLIP",)}}

    def run(self, vae, clip=None):
        NOTES.append(("needs", vae))


class Lacking(Source):
    """A checkpoint without VAE and text encoder."""

    RETURN_TYPES = ("CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return None, None


def test_a_part_that_the_checkpoint_lacks_is_named_before_the_node_begins():
    classes = {cls.__name__: cls for cls in (NeedsAll, Lacking)}
    workflow = graph(c=("Lacking", {}), o=("NeedsAll", {"vae": ["c", 1]}))
    with pytest.raises(NodeFailure, match=r"node o \(NeedsAll\): vae: the checkpoint that it comes from holds no VAE;"):
        execute(workflow, plan(workflow, classes, {}), classes)
    assert not NOTES
