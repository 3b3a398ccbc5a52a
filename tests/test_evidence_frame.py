"""The evidence's frame: stages that resume and fail, a report of the results alone, and the command line."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from diff2flow_nodes import cli
from diff2flow_nodes.bench.evidence import command, provenance, runner, section
from diff2flow_nodes.bench.evidence.registry import STAGES, chosen
from diff2flow_nodes.bench.evidence.report import write_report
from diff2flow_nodes.bench.evidence.runner import run_all
from diff2flow_nodes.bench.evidence.section import Table
from diff2flow_nodes.bench.evidence.stage import SECTIONS, Context, Stage, number
from diff2flow_nodes.bench.evidence.store import Store
from diff2flow_nodes.tests.evidence_fakes import AFTER, ALL, BAD, DYING, GOOD, counted, shown


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "models", tmp_path / "out", workers=0, code="abc")


def ticks(context):
    return len((context.folder("count") / "ticks").read_text())


def test_what_is_done_is_not_measured_again(context, tmp_path):
    store = Store(tmp_path / "results", "abc")
    first = run_all([GOOD], context, store)
    assert run_all([GOOD], context, store) == first and ticks(context) == 1
    quick = Context(context.models, context.work, quick=True, workers=0, code="abc")
    run_all([GOOD], quick, store)
    assert ticks(context) == ticks(quick) == 1  # each kind has a folder of its own
    run_all([GOOD], context, store)
    assert ticks(context) == 2  # the other kind's result took the place of this one's
    run_all([GOOD], context, Store(tmp_path / "results", "other code"))
    assert ticks(context) == 3
    run_all([GOOD], context, Store(tmp_path / "results", ""))
    assert ticks(context) == 3


def test_a_failing_stage_is_named_and_the_others_go_on(context, tmp_path):
    store = Store(tmp_path / "results", "abc")
    found = run_all(ALL, context, store)
    assert found["good"]["result"]["numbers"]["answer"]["value"] == 42.0
    assert found["bad"]["error"] == "RuntimeError: no such luck"
    assert found["after"]["error"] == "ValueError: needs 'bad', which failed"
    assert found["left"]["left_out"] == "nobody is there"
    assert found["last"]["left_out"] == "needs 'left', which was left out: nobody is there"
    assert [store.is_done(stage, context) for stage in ALL] == [True, False, False, False, False]


def test_stages_that_lack_others_or_need_each_other_are_refused(context, tmp_path):
    store = Store(tmp_path / "results", "abc")
    with pytest.raises(ValueError, match="stage 'after' needs bad: run them, too"):
        run_all([AFTER], context, store)
    one, two = (Stage(a, a, 1, (0, 0), counted, shown, needs=(b,)) for a, b in (("one", "two"), ("two", "one")))
    with pytest.raises(ValueError, match="the stages one, two need each other in a circle"):
        run_all([one, two], context, store)


def test_a_process_that_dies_is_a_failure(tmp_path):
    context = Context(tmp_path / "models", tmp_path / "out", workers=2, code="abc")
    found = run_all([GOOD, DYING], context, Store(tmp_path / "results", "abc"))
    assert found["dying"]["error"].startswith("its process ended with code 7")
    assert "result" in found["good"] and found["good"]["provenance"]["machine"]["threads"] == 1


def test_equal_results_give_the_same_report(context, tmp_path):
    document = {"format": 1, "kind": "quick", "stages": run_all(ALL, context, Store(tmp_path / "results", "abc"))}
    document = json.loads(json.dumps(document))
    reports = [tmp_path / name / "REPORT.md" for name in ("a", "b")]
    for report in reports:
        (report.parent / "report_plots").mkdir(parents=True)
        (report.parent / "report_plots" / "old.png").touch()
        write_report(document, report, ALL)
    text = reports[0].read_text()
    assert text == reports[1].read_text()
    plots = [sorted((report.parent / "report_plots").iterdir()) for report in reports]
    assert [plot.name for plot in plots[0]] == ["curve.png"]
    assert plots[0][0].read_bytes() == plots[1][0].read_bytes()
    for line in (
        "Of 2 claims 1 hold, 1 do not, 0 were measured too little to say. The main",
        "| [A good one](#a-good-one) | it is 42 | 42 | ≤ 43 | holds |",
        "All that does not hold:\n\n| measured in | claim | found | goal |\n|---|---|---|---|\n"
        "| [A good one](#a-good-one) | it is 7 | 42 | 7 |\n",
        "| it is 7 | 42 | 7 | **does not hold** |",
        "- **bad failed:** RuntimeError: no such luck",
        "- left was left out: nobody is there",
        "## 1. Exactness",
        "![A curve](report_plots/curve.png)",
        "| answer | 42 |",
        "`python -m diff2flow_nodes bench --only good`; commit ",
        "; seeds 0, 1, 2, ± standard deviation; ",
    ):
        assert line in text, line
    assert str(tmp_path) not in text


def test_a_deviation_has_no_sign():
    assert section.shown({"mean": 0.5, "deviation": 0.25, "seeds": 3}, "{:+.2f}") == "+0.50 ± 0.25"


def test_what_the_most_waits_for_begins_first(context, monkeypatch):
    begun = []
    monkeypatch.setattr(runner, "measure", lambda stage, *_: begun.append(stage.name))
    kinds = {"short": 1.0, "first": 0.1, "long": 5.0}
    stages = [replace(GOOD, name=name, minutes=(minutes, 0.1)) for name, minutes in kinds.items()]
    stages[2] = replace(stages[2], needs=("first",))
    run_all(stages, context, Store(context.work / "results", "abc"))
    assert begun == ["first", "long", "short"]


def _options(tmp_path, *words):
    return cli.build_parser().parse_args(["bench", "--out", str(tmp_path / "out"), *words])


def test_the_command_writes_results_and_report_and_says_where(tmp_path, capsys):
    said: list[str] = []
    stages = (GOOD, BAD)
    code = command.bench(_options(tmp_path, "--quick", "--workers", "1"), said.append, stages)
    assert code == 1 and capsys.readouterr().err == "error: bad: RuntimeError: no such luck\n"
    results, report = map(Path, said)
    document = json.loads(results.read_text())
    assert list(document["stages"]) == ["good", "bad"] and document["kind"] == "quick"
    assert document["stages"]["good"]["settings"]["amount"] == 2 and report.read_text().startswith("# Evidence")
    assert command.bench(_options(tmp_path, "--quick", "--only", "good"), said.append, stages) == 0
    assert command.bench(_options(tmp_path, "--only", "nobody"), said.append, stages) == 2
    assert "there is no stage 'nobody'; the stages are good, bad" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quick", "--full"), "--quick and --full exclude each other"),
        (("--full",), "--full measures networks of full size and needs a GPU: give --device cuda, not 'cpu'"),
        (("--workers", "0"), "--workers must be at least 1, not 0"),
    ],
)
def test_options_that_contradict_are_named(tmp_path, capsys, words, message):
    assert command.bench(_options(tmp_path, *words), print, (GOOD,)) == 2
    assert message in capsys.readouterr().err


def test_the_report_that_is_kept_says_what_the_results_say(tmp_path, monkeypatch):
    """Nothing in it is typed by hand, and it is composed again when its words change."""
    drawn = []
    monkeypatch.setattr(
        f"{write_report.__module__}.save_plot", lambda plot, path: drawn.append(f"{path.parent.name}/{path.name}")
    )
    kept, again = provenance.ROOT / "bench", tmp_path / "REPORT.md"
    words = ("--report", str(kept / "results" / "evidence.json"), str(again))
    assert command.bench(_options(tmp_path, *words), print) == 0
    assert again.read_text() == (kept / "REPORT.md").read_text()
    assert sorted(drawn) == sorted(f"report_plots/{path.name}" for path in (kept / "report_plots").glob("*.png"))
    assert command.bench(_options(tmp_path, "--report", str(again), str(tmp_path / "x.md")), print) == 2


def test_only_all_stages_in_earnest_rewrite_the_report(tmp_path):
    context = command._context(_options(tmp_path))
    results, report = command._places(_options(tmp_path), context, whole=True)
    assert results == provenance.ROOT / "bench/results/evidence.json" and report == provenance.ROOT / "bench/REPORT.md"
    for words, whole in ((("--quick",), True), ((), False)):
        results, _ = command._places(_options(tmp_path, *words), context, whole)
        assert results.is_relative_to(tmp_path)


def test_the_registry_is_whole():
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names) and [s.section for s in STAGES] == sorted(s.section for s in STAGES)
    assert {stage.section for stage in STAGES} <= set(SECTIONS)
    assert {"prior_digits", "reflow_quality"} <= {stage.name for stage in chosen(["reflow_negatives"])}
    assert sum(stage.minutes[0] for stage in STAGES) < 240


def test_priors_are_shared_and_loras_are_not(context):
    (context.models / "checkpoints").mkdir(parents=True)
    (context.models / "checkpoints" / "prior.safetensors").touch()
    for _ in range(2):
        own = context.own_models()
        assert (own / "checkpoints" / "prior.safetensors").is_file() and not (own / "loras").exists()
    assert own.is_relative_to(context.work) and context.code in own.parts


def test_commits_are_named_without_the_machines_paths(tmp_path):
    assert provenance.commit(tmp_path) == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = provenance.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "REPORT.md").touch()
    (tmp_path / "bench" / "results" / "evidence.json").touch()
    assert provenance.commit(tmp_path) == clean
    (tmp_path / "bench" / "new.py").touch()
    assert provenance.commit(tmp_path) == f"{clean} modified"


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="a number must be finite"):
        number(float("nan"), "smaller")
    with pytest.raises(ValueError, match="better must be"):
        number(1.0, "bigger")
    with pytest.raises(ValueError, match="has 2 columns, its row"):
        Table("t", ("a", "b"), [("c",)])
