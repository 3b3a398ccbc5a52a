"""Flat shapes: the same every time, captions that are true, what is held out, and the stage that asks for them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from diff2flow_nodes.bench import shape_binding, shape_prior, shape_reader, shapes, tiny_prior
from diff2flow_nodes.bench.evidence.pictures import save_plot
from diff2flow_nodes.bench.evidence.section import Plot, Text
from diff2flow_nodes.bench.evidence.stage import Context
from diff2flow_nodes.bench.evidence.stages import text_binding
from diff2flow_nodes.bench.scene_prior import TRAINED_SEED

torch.set_num_threads(1)


def test_a_drawing_depends_on_its_index_and_seed_alone():
    drawn = [shapes.drawing(index, 3) for index in range(6)]
    assert drawn == [shapes.drawing(index, 3) for index in range(6)]
    assert drawn != [shapes.drawing(index, 4) for index in range(6)]
    torch.testing.assert_close(shapes.rendered(drawn)[4], shapes.rendered(drawn[4:5])[0])


def test_things_have_their_colour_where_the_caption_says():
    prompt = shapes.pair(("circle", "red"), ("square", "blue"), "left of")
    assert prompt.text == "a red circle left of a blue square"
    drawing = shapes.Drawing(prompt, prompt.things, ((32.0, 17.0), (32.0, 47.0)), (12.0, 12.0), ((0.0,) * 3,) * 2, 1.0)
    picture = shapes.rendered([drawing])[0]
    torch.testing.assert_close(picture[32, 17], torch.tensor(shapes.COLOURS["red"]))
    torch.testing.assert_close(picture[32, 47], torch.tensor(shapes.COLOURS["blue"]))
    assert (picture[:10] == 1).all() and (picture[:, :4] == 1).all()


def test_shapes_differ():
    things = [shapes.Thing(name, "black", "left") for name in shapes.SHAPES]
    prompt = shapes.single("circle", "red", "top left")
    drawings = [shapes.Drawing(prompt, (t,), ((32.0, 17.0),), (12.0,), ((0.0,) * 3,), 1.0) for t in things]
    areas = (1 - shapes.rendered(drawings)[..., 0]).sum(dim=(1, 2)) / (1 - shapes.COLOURS["black"][0])
    expected = [3.1416 * 144, 4 * (0.92 * 12) ** 2, 0.5 * 24 * 24, 24 * 2 * 0.4 * 12]
    assert areas.tolist() == pytest.approx(expected, rel=0.02)


def test_no_held_out_kind_is_trained_on_and_captions_are_few():
    drawings = [shapes.drawing(index, TRAINED_SEED) for index in range(2000)]
    assert not {thing.kind for each in drawings for thing in each.things} & set(shapes.HELD_OUT)
    assert len({each.prompt.text for each in drawings}) <= 320
    every = [shapes.drawing(index, TRAINED_SEED, "all") for index in range(500)]
    assert set(shapes.HELD_OUT) <= {thing.kind for each in every for thing in each.things}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'pink' is none of"):
        shapes.single("circle", "pink", "top left")
    with pytest.raises(ValueError, match="'below' is none of"):
        shapes.pair(("circle", "red"), ("square", "blue"), "below")
    with pytest.raises(ValueError, match="not 0"):
        shapes.write("x", 0, 0)
    with pytest.raises(ValueError, match="'three' is none of"):
        shape_binding.prompts("three", 2)
    with pytest.raises(ValueError, match="0.5"):
        replace(tiny_prior.QUALITIES["shapes"], accuracy=0.5)


def test_files_are_written(tmp_path):
    paths = shapes.write(tmp_path, 3, seed=1)
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
    assert Image.open(paths[2]).size == (64, 64)
    assert paths[2].with_suffix(".txt").read_text() == shapes.drawing(2, 1).prompt.text + "\n"


def test_the_key_of_the_prior_stays():
    """Another key would have everyone train it again."""
    assert tiny_prior.QUALITIES["shapes"].key == "ba0c9454b5005359"


def test_the_subject_has_a_caption_for_each_picture():
    subject = shape_prior.ShapeSubject(30)
    assert torch.cat(list(subject.pictures())).shape == (30, 64, 64, 3)
    texts = [subject._texts[i] for i in subject.labels.tolist()]
    assert texts == [shapes.drawing(index, TRAINED_SEED).prompt.text for index in range(30)]


def test_groups_hold_what_they_say():
    trained, seen = set(shapes.pairs("trained")), set(shapes.kinds("trained"))
    two, new = (set(shape_binding.prompts(group, 20)) for group in ("two", "two, new"))
    assert two <= trained and not new & trained
    assert all(thing.kind in seen for each in new for thing in each.things)
    held_out = shape_binding.prompts("one, held out", 16)
    assert {each.things[0].kind for each in held_out} == set(shapes.HELD_OUT)


def _reading(*things):
    """A reader's answer that these things are in one picture."""
    there, shape, colour = torch.zeros(1, 8), torch.zeros(1, 8).long(), torch.zeros(1, 8).long()
    for thing in things:
        place = list(shapes.PLACES).index(thing.place)
        there[0, place] = 0.9
        shape[0, place], colour[0, place] = shapes.SHAPES.index(thing.shape), list(shapes.COLOURS).index(thing.colour)
    return shape_reader.Reading(there, shape, colour)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((("circle", "red", "left"), ("square", "blue", "right")), "shape colour place all"),
        ((("circle", "blue", "left"), ("square", "red", "right")), "shape place swapped"),
        ((("circle", "red", "top"), ("square", "blue", "bottom")), "shape colour"),
        ((("circle", "red", "left"), ("bar", "blue", "right")), "colour place"),
        ((("circle", "red", "left"),), ""),
    ],
)
def test_what_is_right_is_told_apart(monkeypatch, found, expected):
    asked = shapes.pair(("circle", "red"), ("square", "blue"), "left of").things
    monkeypatch.setattr(shape_reader, "read", lambda pictures: _reading(*(shapes.Thing(*each) for each in found)))
    right = shape_reader.judged(torch.zeros(1, 64, 64, 3), [asked])
    names = {name for name, share in right.items() if share}
    assert names == set(expected.split()) or (len(found) == 1 and "place" not in names and "all" not in names)


def _part(value):
    return {name: value for name in ("shape", "colour", "place", "all")}


def _runs(method, seed):
    """Guidance helps, reflow keeps what the teacher has, negatives work."""
    better = {"1": 0.3, "2": 0.5, "3": 0.6, "5": 0.55}
    groups = (*shape_binding.GROUPS, *shape_binding.TOGETHER)
    few = 0.2 if method == shape_binding.BASE else 0.58
    return {
        "cfg": {scale: {group: _part(value + 0.01 * seed) for group in groups} for scale, value in better.items()}
        if method == shape_binding.BASE
        else {},
        "few": {steps: {group: _part(few + 0.01 * seed) for group in groups} for steps in ("4", "2", "1")},
        "negative": {"named": 0.1, "another": 0.9},
    }


class _Bench:
    def __init__(self, models, work, setting, device):
        pass

    run = staticmethod(_runs)

    def bounds(self):
        return {name: {"drawn": _part(1.0), "again": _part(0.9)} for name in ("one", "two")}


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_stage_says_what_it_found(monkeypatch, tmp_path, seeds):
    monkeypatch.setattr(text_binding.shape_binding, "Bench", _Bench)
    context = Context(tmp_path / "models", tmp_path / "out", seeds=seeds)
    result = json.loads(json.dumps(text_binding.run(context)))
    assert result["numbers"]["trained, CFG 3"]["seeds"] == len(seeds)
    section = text_binding.render(result)
    assert {claim.holds for claim in section.claims} == ({None} if len(seeds) == 1 else {True})
    for part in section.parts:
        if isinstance(part, Plot):
            save_plot(part, tmp_path / f"{part.name}.png")
    [story] = [part.text for part in section.parts if isinstance(part, Text)]
    assert "in 4 and 2 and 1 steps" in story and ("does not clearly raise" in story) == (len(seeds) == 1)


def test_settings_are_json(tmp_path):
    quick, normal = (text_binding.setting(Context(tmp_path, tmp_path, quick=quick)) for quick in (True, False))
    json.dumps(asdict(normal))
    assert quick.prior == "shapes_quick" and quick.training < normal.training and quick.guided in quick.cfgs
