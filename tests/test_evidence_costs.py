"""The stages of costs that run on a random network, and depth by the size of its LoRA."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from diff2flow_nodes.bench.evidence.stage import Context
from diff2flow_nodes.bench.evidence.stages import both_hosts, depth_sizes, growth_training, heavy


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "models", tmp_path / "out", quick=True, seeds=(0,))


def test_a_training_step_is_measured_beside_the_bare_one(context, monkeypatch):
    scale = {"batches": [2], "sides": [], "steps": 1, "rounds": 2, "processes": 1}
    monkeypatch.setattr(growth_training, "scale", lambda _: scale)
    monkeypatch.setattr(growth_training, "_fresh", lambda function, name, *given: {"bare": 100, "ours": 120}[name])
    result = json.loads(json.dumps(growth_training.run(context)))
    [case] = result["cases"]
    assert case["median_ratio"]["bare"] == 1.0 and case["seconds"]["ours"] > 0.0
    claims = growth_training.render(result).claims
    assert claims[1].value == "1.200 ± 0.000" and claims[1].holds is False


def test_the_peak_is_that_of_a_process_of_its_own(context):
    found = growth_training._fresh(growth_training._peak, "ours", context.folder("peak"), False, "cpu", 2, 8)
    assert 1e5 < found < 1e9


def test_headless_and_comfyui_take_turns(context, monkeypatch):
    calls = []

    def in_comfy(context, script, rounds, steps):
        calls.append((script, rounds, steps))
        return {"results": [{"batch": 4, "latent": 8, "median_cpu_seconds": {"ours": 2.0}}]}

    monkeypatch.setattr(both_hosts, "in_comfy", in_comfy)
    monkeypatch.setattr(both_hosts, "_headless", lambda context, steps: lambda batch, side: None)
    monkeypatch.setattr(both_hosts, "seconds_on", lambda device: lambda way: lambda: 2.2)
    result = both_hosts.run(context)
    assert calls == [("sampling_cost.py", "1", "4")] * 2
    [claim] = both_hosts.render(result).claims
    assert claim.value == "1.100 ± 0.000" and claim.holds is False


def _cells(error):
    spread = {"mean": error, "deviation": 0.01, "seeds": 3}
    keys = ("steps/2/abs_rel", "steps/2/delta1", "steps/10/abs_rel", "ensemble/abs_rel")
    return dict.fromkeys(keys, spread) | {"trained_parameters": {"mean": 1e6 / error, "deviation": 0.0, "seeds": 3}}


@pytest.mark.parametrize(("errors", "holds"), [((0.2, 0.15, 0.1), True), ((0.1, 0.15, 0.2), False)])
def test_depth_by_size_says_whether_more_is_better(context, monkeypatch, tmp_path, errors, holds):
    found, asked = dict(zip((2, 16, 64), errors, strict=True)), []

    def report(models, out, setting, methods, seeds, device):
        asked.append((out.name, setting.rank))
        path = tmp_path / f"{setting.rank}.json"
        path.write_text(json.dumps({"summary": {"diff2flow": _cells(found[setting.rank])}}))
        return path

    monkeypatch.setattr(depth_sizes.depth_quality, "report", report)
    result = depth_sizes.run(replace(context, quick=False))
    assert asked == [("rank_2", 2), ("depth_quality", heavy.depth_setting(context).rank), ("rank_64", 64)]
    [claim] = depth_sizes.render(json.loads(json.dumps(result))).claims
    assert claim.holds is holds
