"""The headless command line: errors before anything runs, and one whole run."""

import json
import sys

import pytest
from PIL import Image

from diff2flow_nodes import cli
from diff2flow_nodes.hosts import use
from diff2flow_nodes.hosts.headless import HeadlessHost
from diff2flow_nodes.hosts.headless.classes import NodeClasses
from diff2flow_nodes.hosts.headless.graph import plan
from diff2flow_nodes.hosts.headless.workflow import Node, named, override
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint, run_cli, text_to_image


@pytest.fixture
def place(tmp_path):
    """A folder with an (empty) checkpoint file in it: enough for everything that is checked before the run."""
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    (tmp_path / "models" / "checkpoints" / "tiny.safetensors").touch()
    return tmp_path


def lines(place, capsys, workflow, *options):
    """Exit code and stderr's lines of a run inside this process."""
    file = place / "workflow.json"
    file.write_text(workflow if isinstance(workflow, str) else json.dumps(workflow))
    folders = [f"--{name}={place / name}" for name in ("models", "input", "output")]
    try:
        code = cli.main(["run", str(file), *folders, *options])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err.splitlines()


def only_line(place, capsys, workflow, *options):
    code, found = lines(place, capsys, workflow, *options)
    assert code == 2 and len(found) == 1, found
    return found[0]


def changed(node, **inputs):
    workflow = text_to_image()
    workflow[node]["inputs"].update(inputs)
    return workflow


def without(node, name):
    workflow = text_to_image()
    del workflow[node]["inputs"][name]
    return workflow


def of_class(node, class_type):
    workflow = text_to_image()
    workflow[node]["class_type"] = class_type
    return workflow


def node_errors():
    sampler = 'node 3 (KSampler "My sampler")'
    return {
        "unknown class": (of_class("3", "KSamplr"), ['node 3 (KSamplr "My sampler")', "'KSampler'"]),
        "missing input": (without("3", "steps"), [sampler, "steps", "missing", "--set 3.steps=20"]),
        "missing node": (changed("3", model=["44", 0]), [sampler, "model", "node 44"]),
        "output out of range": (changed("3", model=["4", 3]), [sampler, "model", "output 3", "2 VAE"]),
        "wrong type": (changed("3", positive=["4", 0]), [sampler, "positive", "CONDITIONING", "MODEL"]),
        "no link": (changed("3", model="x"), [sampler, "model", "'x'", "link"]),
        "bad link": (changed("3", model=["4"]), [sampler, "model", "['4']"]),
        "too large": (changed("3", cfg=101), [sampler, "cfg", "101", "100"]),
        "too small": (changed("3", steps=0), [sampler, "steps", "0", "1"]),
        "no number": (changed("3", seed="one"), [sampler, "seed", "'one'"]),
        "not whole": (changed("3", steps=2.5), [sampler, "steps", "2.5"]),
        "not finite": (changed("3", cfg="nan"), [sampler, "cfg", "finite"]),
        "no choice": (changed("3", scheduler="karas"), [sampler, "scheduler", "'karas'", "closest: 'karras'"]),
        "no such file": (
            changed("4", ckpt_name="tny.safetensors"),
            ["node 4", "ckpt_name", "'tny.safetensors'", "'tiny.safetensors'"],
        ),
        "leads out": (changed("9", filename_prefix="../x"), ["node 9 (SaveImage)", "filename_prefix", "'../x'"]),
        "embedding": (changed("6", text="a embedding:cat"), ["node 6 (CLIPTextEncode)", "text", "embedding:cat"]),
        "circle": (changed("5", width=["3", 0]), ["circle", "node 3", "node 5"]),
    }


@pytest.mark.parametrize("case", node_errors())
def test_one_line_names_node_input_value_and_way_out(place, capsys, case):
    workflow, words = node_errors()[case]
    line = only_line(place, capsys, workflow)
    assert all(word in line for word in words), line


def test_all_problems_are_listed(place, capsys):
    code, found = lines(place, capsys, changed("3", cfg=500, model=["44", 0], seed="x"))
    assert code == 2
    assert [word for word in ("cfg", "model", "seed") if any(f"input {word}" in line for line in found)] == [
        "cfg",
        "model",
        "seed",
    ]


@pytest.mark.parametrize(
    "setting, words",
    [
        ("nope.seed=1", ["nope", "closest"]),
        ("CLIPTextEncode.text=a", ["2 nodes", "6, 7"]),
        ("3.sede=1", ["'sede'", "'seed'"]),
        ("seed", ["NODE.INPUT=VALUE"]),
        ("My sampler.steps=0", ["node 3", "steps", "0"]),
    ],
)
def test_wrong_settings(place, capsys, setting, words):
    line = only_line(place, capsys, text_to_image(), "--set", setting)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "name, words",
    [
        ("nope", ["--only nope", "closest"]),
        ("CLIPTextEncode", ["--only", "2 nodes", "6, 7"]),
        ("My sampler", ["node 3", "no output node", "node 9 (SaveImage)"]),
    ],
)
def test_what_cannot_be_asked_for_alone(place, capsys, name, words):
    line = only_line(place, capsys, text_to_image(), "--only", name)
    assert all(word in line for word in words), line


def test_only_what_is_asked_for_is_planned():
    prompt = text_to_image()
    prompt["10"] = {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["4", 2]}}
    prompt["11"] = {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "empty"}}
    workflow = {key: Node(key, entry["class_type"], entry["inputs"]) for key, entry in prompt.items()}
    classes = NodeClasses(dict)
    assert set(plan(workflow, classes, {})) == set(prompt)
    assert plan(workflow, classes, {}, only=named(workflow, ["11"])) == ["5", "4", "10", "11"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", ["not JSON", "line 1"]),
        ("[]", ["holds no nodes"]),
        ({"nodes": [], "links": []}, ["Export (API)"]),
        ({"1": {"inputs": {}}}, ["'1'", "class_type"]),
        ({"5": {"class_type": "EmptyLatentImage", "inputs": {"width": 8}}}, ["no output node"]),
    ],
)
def test_files_that_are_no_workflow(place, capsys, content, words):
    line = only_line(place, capsys, content)
    assert all(word in line for word in words), line


def test_a_missing_image_is_found_before_the_run(place, capsys):
    workflow = changed("8", samples=["10", 0])
    workflow["8"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 2]}}
    workflow["10"] = {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}
    workflow["9"]["inputs"]["images"] = ["10", 0]
    line = only_line(place, capsys, workflow)
    assert "node 10 (LoadImage)" in line and "'cat.png'" in line


def test_values_are_converted_as_declared(place):
    use(HeadlessHost(place / "models", place / "input", place / "output"))
    workflow = {key: Node(key, n["class_type"], n["inputs"]) for key, n in text_to_image(steps="4", cfg=7).items()}
    override(workflow, ["3.seed=18446744073709551615", "6.text=42", "SaveImage.filename_prefix=a b"])
    assert plan(workflow, NodeClasses(dict), {})[-1] == "9"
    inputs = workflow["3"].inputs
    assert (inputs["steps"], inputs["cfg"], inputs["seed"]) == (4, 7.0, 2**64 - 1)
    assert workflow["6"].inputs["text"] == "42" and workflow["9"].inputs["filename_prefix"] == "a b"


def test_wrong_workflows_are_told_before_diffusers_is_imported(place):
    import subprocess

    code = (
        "import sys; from diff2flow_nodes.cli import main;"
        f" code = main(['run', {str(place / 'none.json')!r}]);"
        " print(code, 'diffusers' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_whole_run(tmp_path):
    make_checkpoint(tmp_path / "models" / "checkpoints" / "tiny.safetensors")
    (tmp_path / "output" / "test").mkdir(parents=True)
    (tmp_path / "output" / "test" / "picture_00007_.png").touch()
    done = run_cli(tmp_path, text_to_image(), "--set", "KSampler.steps=1", "--set", "EmptyLatentImage.batch_size=2")
    assert done.returncode == 0, done.stderr
    expected = [str(tmp_path / "output" / "test" / f"picture_{number:05}_.png") for number in (8, 9)]
    assert done.stdout.splitlines() == expected
    assert "sampling: 100%" in done.stderr
    with Image.open(expected[0]) as picture:
        assert picture.size == (64, 64)
        prompt = json.loads(picture.text["prompt"])
    assert prompt["3"]["inputs"]["steps"] == 1 and prompt["3"]["_meta"] == {"title": "My sampler"}
    assert {path.suffix for path in (tmp_path / "output").rglob("*") if path.is_file()} == {".png"}
