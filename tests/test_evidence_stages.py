"""The stages: what the cheap ones find, and that every report's renders take the results that there are."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.bench import depth_table
from diff2flow_nodes.bench.evidence import comfy, oracle
from diff2flow_nodes.bench.evidence.pictures import save_plot
from diff2flow_nodes.bench.evidence.section import Plot, Text
from diff2flow_nodes.bench.evidence.stage import Context
from diff2flow_nodes.bench.evidence.stages import (
    adaptation,
    depth_shown,
    exactness,
    fractional,
    growth_data,
    growth_sampling,
    heavy,
    heavy_shown,
    priors,
    sizes,
    startup,
)
from diff2flow_nodes.bench.runs import run_name
from diff2flow_nodes.tests.test_training_layers import SIZES

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "models", tmp_path / "out", quick=True, seeds=(0,))


def _fits(section, tmp_path):
    """Plots can be drawn, claims and tables have their strings."""
    for part in section.parts:
        if isinstance(part, Plot):
            save_plot(part, tmp_path / f"{part.name}.png")
            assert (tmp_path / f"{part.name}.png").stat().st_size > 5000
    return {claim.text: claim.holds for claim in section.claims}


def test_ours_is_exact_and_the_published_rule_is_off_as_described(context, tmp_path):
    result = exactness.run(context)
    for name, case in result["cases"].items():
        if name.startswith("scaled_linear"):
            assert case["worst"]["float64"] <= 1e-12 and case["worst"]["float32"] <= 1e-5
        assert max(error for error in case["published"] if error) > 1e5 * case["worst"]["float64"]
    found = [result["named"][t]["published"] for t in ("0.7", "0.9", "0.97")]
    assert found == pytest.approx([0.009, 0.03, 0.06], rel=0.1)
    holds = _fits(exactness.render(json.loads(json.dumps(result))), tmp_path)
    assert [verdict for verdict in holds.values() if verdict is not None] == [True, True]


def test_the_published_rule_agrees_between_predictions():
    """From one x and one k, eps, v and x0 say nearly the same; interpolated tables bend alpha² + sigma² = 1."""
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x_flow, levels = oracle.states(t, 0.4), NoiseSchedule.scaled_linear().alphas_cumprod
    found = [oracle.published_velocity(x_flow, t, levels, kind, 0.4) for kind in ("eps", "v", "x0")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)


def test_an_error_in_our_velocity_would_be_seen(monkeypatch):
    alignment = Alignment(NoiseSchedule.scaled_linear(), "v")
    t = torch.tensor([0.5], dtype=torch.float64)
    right = exactness.ours(alignment, t, 0.4)
    monkeypatch.setattr(alignment, "velocity", lambda output, x, t: Alignment.velocity(alignment, output, x, t) * 1.001)
    assert float(right) < 1e-12 and float(exactness.ours(alignment, t, 0.4)) == pytest.approx(1e-3, rel=1e-3)


def test_the_sizes_are_those_of_the_presets(context, tmp_path):
    result = sizes.run(context)
    for (network, preset), size in SIZES.items():
        assert result["trained"][f"{network[:2]}{network[2]}.{network[3]}, {preset}"] == size
    assert _fits(sizes.render(result), tmp_path) == dict.fromkeys(_fits(sizes.render(result), tmp_path), True)


def test_datasets_and_pairs_take_flat_memory(tmp_path):
    cases = [{"items": n, **growth_data.dataset_costs(tmp_path / f"d{n}", n)} for n in (64, 640)]
    section = growth_data.render_dataset({"cases": cases})
    assert _fits(section, tmp_path)["memory of drawing a batch, 10 times as many images"]
    found = growth_data.pairs_costs(tmp_path / "pairs", 9000)
    assert found["index_bytes"] == 8 * 9000 and found["other_bytes"] < 1e6
    _fits(growth_data.render_pairs({"cases": [{"pairs": 9000, **found}]}), tmp_path)


def test_sampling_is_measured_beside_the_bare_calls(context, tmp_path):
    bench = growth_sampling.Bench(tmp_path, 32, False, "cpu")
    case = bench.case(1, 8, 2, 2)
    assert case["median_ratio"]["bare"] == 1.0 and case["median_ratio"]["ours"] > 0.5
    cases = {name: [case] for name in ("batch", "side", "steps")}
    section = growth_sampling.render({"cases": cases, "parameters": bench.parameters})
    _fits(section, tmp_path)
    assert "in one step" not in section.parts[0].text
    short = {**cases, "side": [case, {**case, "side": 128, "steps": 1}]}
    section = growth_sampling.render({"cases": short, "parameters": bench.parameters})
    assert section.parts[0].text.endswith("Side 128 is sampled in one step, 3 rounds.")


def test_the_largest_latent_is_sampled_in_one_step_where_it_would_take_long(context):
    normal, full = replace(context, quick=False), replace(context, quick=False, full=True)
    assert growth_sampling.sizes(growth_sampling.scale(normal))["side"][-2:] == [(1, 64, 4, 5), (1, 128, 1, 3)]
    assert growth_sampling.sizes(growth_sampling.scale(full))["side"][-1] == (1, 128, 4, 5)


def test_the_start_is_measured_in_fresh_processes(context, monkeypatch, tmp_path):
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    seconds = {"pass": 0.1, "import torch": 2.0}
    monkeypatch.setattr(
        startup, "_seconds", lambda code: seconds.get(code, 0.2 if code.startswith("import time") else 2.3)
    )
    result = startup.run(context)
    assert result["numbers"]["import alone"]["value"] == pytest.approx(2.2)
    assert list(_fits(startup.render(result), tmp_path).values()) == [True]


def test_a_pack_that_cannot_be_imported_fails():
    assert startup._seconds("print(0.25)") == 0.25
    with pytest.raises(ValueError, match="cannot be imported"):
        startup._seconds("import nothing_of_that_name")


def test_comfyuis_own_words_are_read():
    line = "   0.2 seconds (IMPORT FAILED): /x/other\n   0.1 seconds: /base/custom_nodes/diff2flow_nodes\n"
    assert startup._REPORTED.search(line).group(1) == "0.1"


def test_what_needs_comfyui_says_so(context, monkeypatch, tmp_path):
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    assert heavy.COST[0].left_out(context) == "COMFYUI_DIR is not set"
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(ValueError, match="no python for ComfyUI: .* set COMFYUI_PYTHON"):
        comfy.comfy_python(tmp_path)


def _spread(value, deviation=0.01):
    return {"mean": value, "deviation": deviation, "seeds": 3}


def test_fractional_timesteps_are_shown(tmp_path):
    means = {}
    for part in ("all", *fractional.PARTS):
        for f in fractional.FRACTIONS:
            means[f"{part}/error/{f:g}"] = _spread(0.3 + 0.01 * f)
        for f in (0.25, 0.5, 0.75):
            means |= {f"{part}/{kind}/{f:g}": _spread(0.001) for kind in ("excess", "floored_excess")}
    section = fractional.render({"summary": means})
    assert list(_fits(section, tmp_path).values()) == [True]


def test_the_reports_that_there_are_can_be_shown(tmp_path):
    found = json.loads((RESULTS / "reflow_quality.json").read_text())
    verdicts = _fits(heavy_shown.reflow(found), tmp_path)
    assert all(
        verdicts[f"Fréchet distance of our reflow at {n} over the teacher's at 25"] for n in ("4 steps", "1 step")
    )
    found = json.loads((RESULTS / "reflow_negatives.json").read_text())
    shares = {name: each for name, each in found.items() if isinstance(each, dict)}
    assert _fits(heavy_shown.negatives({"shares": shares, "cfg": found["cfg"]}), tmp_path)
    for version in ("0.3.64", "0.33.0"):
        _fits(heavy_shown.comfy_sampling(json.loads((RESULTS / f"sampling_cost_{version}.json").read_text())), tmp_path)
        _fits(heavy_shown.comfy_training(json.loads((RESULTS / f"training_cost_{version}.json").read_text())), tmp_path)


def test_depth_and_pairs_are_shown(tmp_path):
    section = depth_shown.depth(_depth_result({"flow_matching": 0.2, "diffusion": 0.1}))
    assert list(_fits(section, tmp_path).values()) == [True, True, False, False]
    text = " ".join(part.text for part in section.parts if isinstance(part, Text))
    assert "worse than diff2flow: flow_matching in 10 steps" in text and "Why naive" not in text
    assert "no different by more than the deviation: diffusion in 10 steps" in text
    assert "Tried, too: 10 training steps; AbsRel of diffusion over diff2flow's is 1.000 ± " in text
    assert "Tried, too: diff2flow, velocity weighting; AbsRel of flow_matching over its is 4.000" in text
    worse = depth_shown.depth(_depth_result({"flow_matching": 0.05, "diffusion": 0.05}))
    assert "better: flow_matching" in worse.parts[0].text and worse.parts[1].text.startswith("Why naive")
    result = {"bare_seconds": [1.0, 1.1], "pairs_seconds": [1.02, 1.1], "share_of_bare_throughput": 0.99, "batch": 4,
              "side": 256, "steps": 4, "numbers": {"share": {"spread": 0.01}}}  # fmt: skip
    assert list(_fits(heavy_shown.throughput(result), tmp_path).values()) == [True]


def _depth_result(values):
    """A report on depth in which a method's every number is its value."""
    values = {"diff2flow": 0.1, "diff2flow, velocity weighting": 0.05, **values}
    setting = {"sample_steps": [10, 4, 2, 1], "steps": 20, "parts": 2, "batch_size": 8, "rank": 16}
    summary = {}
    for method, value in values.items():
        keys = [f"steps/{n}/{name}" for n in setting["sample_steps"] for name in ("abs_rel", "delta1")]
        summary[method] = {key: _spread(value) for each in keys for key in (each, f"after/10/{each}")}
    summary["constant depth"] = {name: _spread(0.5) for name in ("abs_rel", "delta1")}
    return {"summary": summary, "setting": setting}


def test_the_report_on_depth_shows_the_ensembles_that_were_measured():
    known = json.loads((RESULTS / "depth_quality.json").read_text())

    def ensembles(without):
        summary = {
            method: {key: cell for key, cell in cells.items() if method not in without or "ensemble" not in key}
            for method, cells in known["summary"].items()
        }
        text = depth_table.markdown(known["setting"], summary)
        return text[text.index("## Ensembles") :].split("\n\n")[1] if "## Ensembles" in text else ""

    assert "| flow_matching |" in ensembles(())
    assert "| flow_matching |" not in ensembles(("flow_matching",)) and "| diff2flow |" in ensembles(("flow_matching",))
    assert not ensembles(tuple(known["summary"]))


def test_every_kind_of_run_has_its_settings(context):
    normal, full = replace(context, quick=False), replace(context, quick=False, full=True)
    for kind in (context, normal, full):
        for make in (adaptation.ablation_setting, heavy.reflow_setting, heavy.depth_setting):
            json.dumps(asdict(make(kind)))
        assert priors.digits_prior(kind) in ("quick", "digits", "bench") and fractional.scale(kind)["items"] > 0
    assert heavy.reflow_setting(context).pairs < heavy.reflow_setting(normal).pairs


def test_the_reports_on_the_tiny_prior_become_results(context, monkeypatch, tmp_path):
    """The adapters, with the reports themselves left out: they call what there is and find the numbers in it."""

    def written(name, content):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return lambda *given, **more: path

    reflow = json.loads((RESULTS / "reflow_quality.json").read_text())
    stepped = {f"steps/{n}/{name}": _spread(0.1) for n in (10, 4, 2, 1) for name in ("abs_rel", "delta1")}
    depth = {"setting": {"sample_steps": [10, 4, 2, 1]}, "summary": {"diff2flow": stepped}}
    monkeypatch.setattr(heavy.reflow_quality, "report", written("r.json", reflow))
    monkeypatch.setattr(heavy.depth_quality, "report", written("d.json", depth))
    found = {run.__name__: run(context)["numbers"] for run in (heavy.run_reflow, heavy.run_depth)}
    assert found["run_reflow"]["fast, 2 steps, frechet"]["better"] == "smaller"
    assert found["run_depth"]["diff2flow, steps/2/abs_rel"]["seeds"] == 3
    assert (context.own_models() / "checkpoints").is_symlink()


def test_negative_prompts_are_measured_with_the_loras_of_the_setting(context, monkeypatch):
    asked = []

    def shares(host, prior, lora, steps, each):
        assert each == 5  # the context is a quick one's
        asked.append((prior, lora, steps))
        return {"without": 0.1, "with": 0.02}

    monkeypatch.setattr(heavy.reflow_negatives, "shares", shares)
    monkeypatch.setattr(heavy.reflow_negatives.tiny_prior, "ensure_narrow", lambda name, _: Path(f"{name}.safetensors"))
    monkeypatch.setattr(heavy.reflow_negatives, "use", lambda host: None)
    result = heavy.run_negatives(context)
    names = [run_name(name, 0, heavy.reflow_setting(context)) for name in ("fast", "paper")]
    assert asked == [("quick.safetensors", "", 25), *(("quick.safetensors", f"{n}.safetensors", 4) for n in names)]
    assert [claim.holds for claim in heavy_shown.negatives(result).claims] == [True]


def test_what_runs_inside_comfyui_is_read_from_its_output(context, monkeypatch, tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho starting\ncat {RESULTS / 'sampling_cost_0.33.0.json'}\n")
    python.chmod(0o755)
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setattr(comfy, "build_random", lambda path: path.touch())
    numbers = heavy.run_comfy_sampling(context)["numbers"]
    assert numbers["ours over bare, batch 4"]["value"] == pytest.approx(1.024, abs=1e-3)
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    with pytest.raises(ValueError, match="sampling_cost.py ended with code 3: broken"):
        heavy.run_comfy_sampling(context)
