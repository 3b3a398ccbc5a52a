"""Prompts of pairs: where they come from, and wildcards as a function of seed and pair number."""

import time
from collections import Counter

import pytest

from diff2flow_nodes.training.prompts import Lines, Prompts, collected_prompts


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "input" / "wildcards"
    (folder / "deep").mkdir(parents=True)
    (folder / "colors.txt").write_text("red\n\n{light|dark} blue\n")
    (folder / "deep" / "animals.txt").write_text("fox\n__colors__ cat\n")
    return folder


def _collected(folder, text="", file=None, captions=()):
    return collected_prompts(text, file, captions, folder)


def test_lines_of_text_file_and_captions_follow_each_other(folder, tmp_path):
    file = tmp_path / "input" / "prompts.txt"
    file.write_text("﻿from the file,  é\n", encoding="utf-8")
    prompts = _collected(folder, " one \n\ntwo", file, ["caption", "caption", "", "other"])
    assert list(prompts.lines) == ["one", "two", "from the file, é", "caption", "other"]
    assert [prompts.at(k, 0) for k in (0, 1, 5, 9)] == ["one", "two", "one", "other"]


def test_wildcards_depend_on_seed_and_pair_alone(folder):
    text = "a {small|{very |}large} __deep/animals__, __colors__"
    prompts = _collected(folder, text)
    made = [prompts.at(k, 3) for k in range(200)]
    assert made == [_collected(folder, text).at(k, 3) for k in range(200)]
    assert made != [prompts.at(k, 4) for k in range(200)]
    sizes = Counter(text.split("large")[0] if "large" in text else "small" for text in made)
    assert set(sizes) == {"small", "a ", "a very "} and 60 < sizes["small"] < 140
    assert not any(c in text for text in made for c in "{}|_") and any("cat, dark blue" in text for text in made)


def test_characters_can_be_escaped_and_names_with_underscores_stay(folder):
    prompts = _collected(folder, r"\{a\|b\} {x\|y|x\|y} (c:1.2) \(d\) snake_case __")
    assert prompts.at(0, 0) == r"{a|b} x|y (c:1.2) \(d\) snake_case __"


def test_the_digest_knows_lines_and_wildcards(folder):
    before = _collected(folder, "a __colors__\nb").digest()
    assert before == _collected(folder, "a __colors__\n\n b ").digest() != _collected(folder, "a __colors__ b").digest()
    (folder / "colors.txt").write_text("green")
    assert _collected(folder, "a __colors__\nb").digest() != before
    assert Lines(["ab", "c"]).digest() != Lines(["a", "bc"]).digest()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "prompts is empty: write one prompt a line"),
        ("a {b|c", "'a {b|c' has a '{' or '}' without its partner"),
        ("a }b{", "without its partner"),
        ("a __nothing__", "no 'nothing.txt' in the folder 'input/wildcards'"),
        ("a __x/../../prompts__", "must stay inside the folder 'wildcards'"),
    ],
)
def test_what_cannot_be_read_is_said(folder, text, message):
    with pytest.raises(ValueError) as raised:
        _collected(folder, text)
    assert message in str(raised.value)


def test_circles_and_other_encodings_are_errors(folder):
    (folder / "loop.txt").write_text("__loop__")
    with pytest.raises(ValueError, match="without end"):
        _collected(folder, "__loop__").at(0, 0)
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="'latin.txt' is not UTF-8"):
        _collected(folder, "__latin__")


def test_a_million_lines_are_one_piece_of_memory():
    import tracemalloc

    tracemalloc.start()
    lines = Lines(f"number {i}" for i in range(100_000))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lines[99_999] == "number 99999" and kept < 3e6
    assert Prompts(lines).at(100_000, 0) == "number 0"


def _seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.mark.parametrize("text", ["__a.", "{x|y}", "\\{"])
def test_the_time_grows_with_the_text_and_not_with_its_square(folder, text):
    """16 times the text takes about 16 times as long, and never 256 times."""

    def work(count):
        _collected(folder, "{x|y}" + text * count).at(0, 0)

    short, long = (min(_seconds(lambda count=count: work(count)) for _ in range(3)) for count in (1000, 16000))
    assert long < 60 * short + 0.05


def test_wildcards_that_name_each_other_many_times_end_in_a_sentence(folder):
    """4 to the 12th copies of one letter would be made of 13 small files."""
    for i in range(12):
        (folder / f"l{i}.txt").write_text(" ".join([f"__l{i + 1}__"] * 4) + "\n")
    (folder / "l12.txt").write_text("x\n")
    with pytest.raises(ValueError, match="in '__l0__' put more than 100000 characters into one prompt"):
        _collected(folder, "__l0__").at(0, 0)
    assert _collected(folder, "__l9__").at(0, 0) == " ".join("x" * 64)
