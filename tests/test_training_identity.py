"""What identifies cached and continued work: all that changes it, told in words; nothing where nothing is set."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diff2flow_nodes.hosts.fingerprint import said
from diff2flow_nodes.nodes.datasets import Diff2FlowImageDataset, Diff2FlowImages
from diff2flow_nodes.nodes.reflow import Diff2FlowReflowPairs
from diff2flow_nodes.tests.reflow_fakes import PROMPTS, make, maker, pair_settings
from diff2flow_nodes.tests.training_fakes import FakeHost, SilentProgress, TinyBackbone, tiny_dataset, tiny_job
from diff2flow_nodes.training import finetune as finetuning
from diff2flow_nodes.training.buckets import Sizes
from diff2flow_nodes.training.captions import literal, named_inversions
from diff2flow_nodes.training.encoding import Encoders, settings_key
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.identity import Identity, digest_of
from diff2flow_nodes.training.image_folder import FolderSettings, image_dataset
from diff2flow_nodes.training.pairs import MANIFEST, _digest
from diff2flow_nodes.training.prompts import Prompts
from diff2flow_nodes.training.reflow import pair_identity, reflow_pairs

SKIP = "clip skip"


def _clip(skip: str = "-1", weights: str = "t") -> Identity:
    return Identity(weights, {} if skip == "-1" else {SKIP: skip}, {SKIP: "-1"})


def test_keys_of_work_with_default_settings_are_those_of_the_versions_before(tmp_path):
    """Known answers: written down before there was anything but weights in them."""
    assert settings_key(_clip(weights="f2dedc948894a986e6c3f137ebb1a61959bae08fcf283a95b28d7e1fc2032ea7")) == (
        "7a10fda9b43530f5"
    )
    assert _digest(pair_identity(PROMPTS, maker(), pair_settings())) == "71ccb8eeb696d687"
    dataset = tiny_dataset(tmp_path / "data")
    assert dataset.identity() == "0420b7af371db1da"
    run = json.dumps(tiny_job(tmp_path, dataset=dataset).identity(), sort_keys=True)
    assert hashlib.sha256(run.encode()).hexdigest()[:16] == "535b46b98729f739"
    assert make(tmp_path / "pairs", 3).identity() == "7bbca69889ec3434"
    texts = [path.name for path in (tmp_path / "pairs").iterdir() if path.is_dir()]
    assert texts == ["texts-d67f3adce6001b9b-fp16"]


def test_an_identity_is_its_weights_until_something_is_set():
    assert _clip() == "t" and _clip("-2") != "t" and len({_clip("-2"), _clip("-3"), _clip()}) == 3
    assert json.loads(json.dumps([_clip()])) == ["t"]


class Counted:
    def __init__(self, factor: float) -> None:
        self.factor, self.device, self.callback, self.layer = factor, None, print, torch.nn.Linear(1, 1)


def test_functions_and_objects_are_told_by_what_they_hold():
    def scaled(factor):
        return lambda x: x * factor

    assert said(scaled(2)) == said(scaled(2)) != said(scaled(3))
    assert said([torch.ones(3)]) != said([torch.zeros(3)])
    assert said({"a": Counted(1.0)}) == said({"a": Counted(1.0)}) != said({"a": Counted(2.0)})
    circle = SimpleNamespace(n=1)
    circle.itself = circle
    assert said(circle) == said(circle)


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("saber (fate)", "saber \\(fate\\)"),
        ("saber \\(fate\\)", "saber \\(fate\\)"),
        ("(a) \\(b) :)", "\\(a\\) \\(b\\) :\\)"),
        ("[dog] {red|blue}", "[dog] {red|blue}"),
    ],
)
def test_brackets_are_escaped_once(caption, prompt):
    assert literal(caption) == prompt and literal(prompt) == prompt


def test_names_of_textual_inversions_are_found_as_the_prompt_may_mean_them():
    assert "neg" in named_inversions(["embedding:neg, cat"]) and "neg" in named_inversions(["(embedding:neg:1.2)"])
    assert "my(1)" in named_inversions([literal("a embedding:my(1)")])
    assert "neg" in named_inversions(["{a|embedding:neg}"]) and named_inversions(["a cat"]) == []


@pytest.fixture
def folder(tmp_path):
    for name in ("saber (fate)", "embedding:neg, cat", "cat"):
        Image.new("RGB", (16, 16), (len(name), 0, 0)).save(tmp_path / f"{len(name)}.png")
        (tmp_path / f"{len(name)}.txt").write_text(name)
    return tmp_path


def _encoded(folder, files=None, text_id="t", **settings):
    """The dataset and the prompts that were encoded for it."""
    asked = []

    def text(prompt):
        asked.append(prompt)
        return torch.full((1, 77, 4), float(len(prompt))), None

    def inversions(names):
        return {name: file for name, file in (files or {}).items() if name in names}

    encoders = Encoders(lambda image: torch.zeros(1, 4, 2, 2), text, "v", text_id, inversions)
    cache = folder.parent / "cache"
    options = FolderSettings(Sizes(16), **settings)
    return image_dataset(folder, cache, options, encoders, lambda total: SilentProgress()), asked


def test_captions_are_encoded_as_letters_unless_weights_are_asked_for(folder):
    dataset, asked = _encoded(folder)
    assert "saber \\(fate\\)" in asked and "saber (fate)" not in asked
    assert [item.caption for item in dataset.items] == ["saber (fate)", "embedding:neg, cat", "cat"]
    assert dataset.batch([0]).captions == ("saber \\(fate\\)",)  # what a text encoder in training is given
    assert "saber \\(fate\\)" in list(dataset.captions())  # and pairs that are made of it
    weighted, asked = _encoded(folder, weighted=True)
    assert asked == ["saber (fate)"] and weighted.batch([0]).captions == ("saber (fate)",)
    assert weighted.identity() != dataset.identity()
    assert float(weighted.batch([0]).context[0, 0, 0]) == 12 and float(dataset.batch([0]).context[0, 0, 0]) == 14


def test_only_captions_that_name_a_file_follow_it(folder):
    missing = _encoded(folder)[0]
    assert _encoded(folder)[1] == []
    added, asked = _encoded(folder, {"neg": "1"})
    assert asked == ["embedding:neg, cat"]
    replaced, asked = _encoded(folder, {"neg": "2", "other": "1"})
    assert asked == ["embedding:neg, cat"]
    assert _encoded(folder, {"neg": "1"})[1] == [] and _encoded(folder)[1] == []
    assert len({missing.identity(), added.identity(), replaced.identity()}) == 3


def test_texts_of_another_layer_are_others(folder):
    first = _encoded(folder, text_id=_clip())[0]
    second, asked = _encoded(folder, text_id=_clip("-2"))
    assert len(asked) == 4 and first.identity() != second.identity()


def test_datasets_of_two_layers_are_not_joined(folder, tmp_path):
    one, two = _encoded(folder, text_id=_clip())[0], _encoded(folder, text_id=_clip("-2"))[0]
    with pytest.raises(ValueError, match=r"different text encoders and cannot be joined \(clip skip: -1 and -2\);"):
        one.joined(two)


def test_nodes_run_again_when_a_file_that_captions_name_changes(monkeypatch, tmp_path):
    from diff2flow_nodes import hosts

    host = FakeHost(tmp_path)
    monkeypatch.setattr(hosts, "_chosen", [host])

    def states():
        pairs = [Diff2FlowReflowPairs.IS_CHANGED(prompts=text, negative="") for text in ("a cat", "embedding:neg")]
        return [*(Diff2FlowImages.IS_CHANGED(captions=text) for text in ("a cat", "embedding:neg")), *pairs]

    before = states()
    host.inversion_files["neg"] = "1"
    assert [a == b for a, b in zip(before, states(), strict=True)] == [True, False, True, False]


@pytest.mark.parametrize("node", [Diff2FlowImageDataset, Diff2FlowImages])
def test_the_nodes_take_letters_where_a_saved_workflow_says_nothing(node, monkeypatch, tmp_path):
    from diff2flow_nodes import hosts

    monkeypatch.setattr(hosts, "_chosen", [FakeHost(tmp_path)])
    *_, last = node.INPUT_TYPES()["optional"].items()
    assert last[0] == "caption_weights" and last[1][1]["default"] is False


def _pairs(folder, count=2, prompts=PROMPTS, **by):
    return reflow_pairs(folder, prompts, maker(**by), pair_settings(count), lambda total, title: SilentProgress())


def test_a_refusal_of_pairs_names_the_setting(tmp_path):
    skipped = _clip("-2")
    _pairs(tmp_path, text_id=skipped)
    assert len(_pairs(tmp_path, 3, text_id=skipped)) == 3
    for changes, words in (
        ({"text_id": _clip()}, "(clip skip: -2 there, -1 here)"),
        ({"text_id": _clip("-2", "u")}, "(another text encoder)"),
        ({"text_id": skipped, "model_id": Identity("n")}, "(another model)"),
        ({"text_id": skipped, "prompts": Prompts(["a"])}, "(another list of prompts)"),
    ):
        with pytest.raises(ValueError) as refused:
            _pairs(tmp_path, 4, **changes)
        assert words in str(refused.value)


def test_pairs_made_before_settings_were_noted_go_on_and_are_refused_in_words(tmp_path):
    _pairs(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["facts"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert len(_pairs(tmp_path, 3)) == 3
    with pytest.raises(ValueError, match=r"\(another text_encoder, or other settings of it\)"):
        _pairs(tmp_path, 4, text_id=_clip("-2"))


def test_pairs_of_another_file_of_a_textual_inversion_are_others(tmp_path):
    prompts = Prompts(["a fox, embedding:neg", "{a|embedding:neg}"])
    files = {"neg": "1"}

    def known(names):
        return {name: files[name] for name in names if name in files}

    _pairs(tmp_path / "a", prompts=prompts, inversions=known)
    files["neg"] = "2"
    with pytest.raises(ValueError, match=r"\(embedding:neg: 1 there, 2 here\)"):
        _pairs(tmp_path / "a", prompts=prompts, inversions=known)
    files.clear()
    with pytest.raises(ValueError, match=r"\(embedding:neg: 1 there, not set here\)"):
        _pairs(tmp_path / "a", prompts=prompts, inversions=known)
    plain = pair_identity(PROMPTS, maker(inversions=known), pair_settings())
    assert plain == pair_identity(PROMPTS, maker(), pair_settings())


def _run(folder, **changes):
    """What the page is told of a run that is not continued; "" of others."""
    progress = SilentProgress()
    ids = {name: changes.pop(name) for name in ("model_id", "encoder_id") if name in changes}
    job = tiny_job(folder, steps=changes.pop("steps", 2), **changes)
    finetune(finetuning.replace(job, **ids), progress)
    return "".join(str(entry["text"]) for entry in progress.events if entry["kind"] == "note")


def test_the_page_is_told_why_a_run_is_not_continued(tmp_path):
    assert _run(tmp_path, model_id=Identity("m")) == ""
    assert _run(tmp_path, model_id=Identity("m"), steps=3) == ""
    assert _run(tmp_path, model_id=Identity("m"), learning_rate=2e-2) == (
        "the run 'style' is not continued: learning_rate: 0.01 there, 0.02 here; 'style_00002' begins anew"
    )
    assert "not continued: another model;" in _run(tmp_path, model_id=Identity("n"), learning_rate=2e-2)
    with_patch = Identity("n", {"injections": "lora (1)"})
    told = _run(tmp_path, model_id=with_patch, learning_rate=2e-2)
    assert "not continued: injections: not set there, lora (1) here;" in told


def test_the_page_is_told_of_another_layer_of_the_text_encoder(tmp_path):
    dataset = tiny_dataset(tmp_path / "data")
    for text_id, words in ((_clip("-2"), ""), (_clip(), "not continued: clip skip: -2 there, -1 here; '")):
        data = finetuning.replace(dataset, text_id=text_id)
        assert words in (told := _run(tmp_path, dataset=data)) and bool(told) == bool(words)
    other = finetuning.replace(dataset, text_id=_clip(), items=dataset.items[:2])
    assert "another set of captions; another set of images" in _run(tmp_path, dataset=other)


class Watching(TinyBackbone):
    """Remembers pixels and tokens of each call."""

    def __call__(self, x_diff, tau, conditioning):
        self.calls = [*getattr(self, "calls", []), (x_diff.shape[-1], conditioning["context"].shape[1])]
        return super().__call__(x_diff, tau, conditioning)


def test_the_memory_check_tries_the_most_pixels_with_the_longest_context(tmp_path, monkeypatch):
    """The longest caption is that of the smallest picture; captions are dropped in training, but not here."""
    for i, (side, words) in enumerate(((32, 1), (16, 9))):
        Image.new("RGB", (side, side // 2), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(" ".join(["word"] * words))

    def text(prompt):
        return torch.zeros(1, 3 * max(1, prompt.count("word")), 6), None

    encoders = Encoders(lambda image: torch.zeros(1, 4, image.shape[1], image.shape[2]), text, "v", "t")
    sizes = Sizes(32, (), "aspect", 8, 2.0, True)
    settings = FolderSettings(sizes)
    dataset = image_dataset(tmp_path, tmp_path / "cache", settings, encoders, lambda total: SilentProgress())
    assert len(dataset.buckets) == 2
    seen, backbone = [], Watching()

    def estimate(network, settings, loss, originals):
        loss()
        seen.extend(backbone.calls)

    monkeypatch.setattr(finetuning, "estimate", estimate)
    goal = finetuning.replace(tiny_job(tmp_path).settings.objective, caption_dropout=1.0)
    finetune(tiny_job(tmp_path, backbone, dataset=dataset, steps=1, batch_size=2, objective=goal), SilentProgress())
    assert seen == [(32, 27)]


def test_the_longest_pair_is_the_one_with_the_longest_context(tmp_path):
    def encode(caption):
        return torch.zeros(1, 3 * (1 + 2 * caption.startswith("a cat")), 6), None

    pairs = _pairs(tmp_path, 6, encode=encode)
    assert pairs.batch([pairs.longest]).captions[0].startswith("a cat")


def test_digests_do_not_depend_on_the_order_of_settings():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
