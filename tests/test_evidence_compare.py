"""bench --compare: what got worse beyond the spread is named, and the exit code says so."""

import json

import pytest

from diff2flow_nodes import cli
from diff2flow_nodes.bench.evidence.compare import compare
from diff2flow_nodes.bench.evidence.stage import number


def _entry(machine="a", settings=None, **numbers):
    about = {"machine": {"cpu": machine}}
    return {"provenance": about, "settings": settings or {}, "result": {"numbers": numbers}}


def _file(path, kind="normal", **stages):
    path.write_text(json.dumps({"format": 1, "kind": kind, "stages": stages}))
    return path


def _compared(tmp_path, one, two):
    return compare(_file(tmp_path / "a.json", stage=one), _file(tmp_path / "b.json", stage=two))


@pytest.mark.parametrize(
    ("better", "before", "after", "worse"),
    [
        ("smaller", 1.0, 1.2, False),  # 2 sqrt(0.1² + 0.1²) = 0.283
        ("smaller", 1.0, 1.3, True),
        ("smaller", 1.3, 1.0, False),
        ("larger", 1.0, 1.3, False),
        ("larger", 1.3, 1.0, True),
        ("", 1.0, 9.0, False),
    ],
)
def test_worse_is_beyond_the_spread_in_the_wrong_direction(tmp_path, better, before, after, worse):
    one, two = (_entry(n=number(value, better, 0.1)) for value in (before, after))
    lines, found = _compared(tmp_path, one, two)
    assert found == (["stage/n"] if worse else [])
    assert lines[-1] == ("1 worse beyond the spread: stage/n" if worse else "0 worse beyond the spread")


def test_the_floor_allows_more(tmp_path):
    one, two = (_entry(n=number(value, "smaller", floor=0.5)) for value in (1.0, 1.4))
    assert _compared(tmp_path, one, two)[1] == []


def test_seconds_count_between_equal_machines_only(tmp_path):
    fast, slow = number(1.0, "smaller", timed=True), number(9.0, "smaller", timed=True)
    assert _compared(tmp_path, _entry(n=fast), _entry(n=slow))[1] == ["stage/n"]
    lines, worse = _compared(tmp_path, _entry(n=fast), _entry("b", n=slow))
    assert worse == [] and "not judged: other machine" in lines[0]


def test_what_only_one_has_is_listed(tmp_path):
    lines, worse = _compared(tmp_path, _entry(a=number(1, "")), _entry(b=number(1, "")))
    assert worse == [] and lines[:2] == ["stage/a: only in the first", "stage/b: only in the second"]
    one, two = _file(tmp_path / "a.json", x=_entry()), _file(tmp_path / "b.json", y=_entry())
    assert compare(one, two)[0][:2] == ["x: only in the first", "y: only in the second"]
    lines, _ = _compared(tmp_path, _entry(settings={"steps": 1}), _entry(settings={"steps": 2}))
    assert lines[0] == "stage: measured with other settings, not compared"


def test_a_stage_that_fails_now_is_worse(tmp_path):
    broken = {"provenance": {}, "settings": {}, "error": "ValueError: no"}
    lines, worse = _compared(tmp_path, _entry(), broken)
    assert worse == ["stage"] and lines[0] == "stage: done -> ValueError: no, WORSE"
    assert _compared(tmp_path, broken, broken)[1] == []


def test_the_command_exits_non_zero_and_names_it(tmp_path, capsys):
    one = _file(tmp_path / "a.json", s=_entry(n=number(1.0, "smaller")))
    two = _file(tmp_path / "b.json", s=_entry(n=number(2.0, "smaller")))
    assert cli.main(["bench", "--compare", str(one), str(two)]) == 1
    assert "s/n: 1 -> 2 (allowed ± 0), WORSE" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", str(one), str(one)]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[1]", "is JSON, but no result of 'bench'"),
        ('{"format": 9, "kind": "normal", "stages": {}}', "has format 9, this version reads 1"),
        ('{"format": 1, "kind": "quick", "stages": {}}', "by a normal run and .* by a quick one"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, content, message):
    good, other = _file(tmp_path / "good.json"), tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(ValueError, match=message):
        compare(good, other)
    assert cli.main(["bench", "--compare", str(good), str(other)]) == 2
    assert "error: " in capsys.readouterr().err
