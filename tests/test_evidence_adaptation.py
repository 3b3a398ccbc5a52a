"""Continued training and another resolution: what is drawn, trained and compared, and what the report says of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from diff2flow_nodes.bench import ablation, classifier, digits
from diff2flow_nodes.bench.evidence.pictures import save_plot
from diff2flow_nodes.bench.evidence.section import Plot, Text
from diff2flow_nodes.bench.evidence.stage import Context
from diff2flow_nodes.bench.evidence.stages import adaptation, adaptation_shown
from diff2flow_nodes.bench.judging import Judge

NUMBERS = ("frechet_features", "frechet_pixels", "accuracy")


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "models", tmp_path / "out", quick=True, seeds=(0, 1, 2))


def _cell(value, deviation=0.1, seeds=3):
    return {"mean": value, "deviation": deviation, "seeds": seeds}


def _result(setting, distances, seeds=3):
    """A result in which a method's every number is its distance."""
    summary, part = {}, setting.steps // setting.parts
    for method, distance in distances.items():
        cell = _cell(distance, seeds=seeds)
        samples = {f"{k}/{n}/{x}": cell for k in adaptation_shown.KINDS for n in setting.sample_steps for x in NUMBERS}
        steps = () if method == "base" else range(part, setting.steps + 1, part)
        validation = {f"validation/{step}": cell for step in (0, *steps)}
        after = {f"after/{step}/{key}": cell for step in steps for key in samples}
        summary[method] = {**validation, **samples, **after}
    return {"setting": json.loads(json.dumps(asdict(setting))), "summary": summary, "runs": {}}


DISTANCES = {
    "base": 9.0,
    "diff2flow": 3.0,
    "diffusion": 3.05,
    "flow_matching": 30.0,
    "diff2flow, velocity weighting": 2.0,
}


@pytest.mark.parametrize("size", [48, 96])
@pytest.mark.parametrize("style", digits.STYLES)
def test_the_classifier_sees_the_same_digits_at_any_size(size, style):
    images, _ = digits.split(held_out=True)
    seen = {side: digits.render(images[:60], digits.STYLES[style], side) for side in (size, 64)}
    assert seen[size].shape == (60, size, size, 3)
    found, usual = (classifier.shrunk(pictures) for pictures in seen.values())
    assert (found - usual).abs().mean() < 0.06 < (found - usual.roll(1, dims=0)).abs().mean()


def test_larger_digits_are_the_same_digits(tmp_path):
    images, _ = digits.split(held_out=True)
    for style in digits.STYLES.values():
        large, usual = (digits.render(images[:20], style, size).movedim(-1, 1) for size in (128, 64))
        shrunk = torch.nn.functional.interpolate(large, size=(64, 64), mode="area")
        assert (shrunk - usual).abs().mean() < 0.02
    assert len(digits.write(tmp_path, "plain", 10, size=48)) == 10
    with pytest.raises(ValueError, match="size must be a multiple of 8 and at least 8, not 50"):
        digits.write(tmp_path, "plain", 10, size=50)


def test_all_digits_are_drawn_together_each_with_its_own_caption():
    host = SimpleNamespace(
        encode_text=lambda clip, text: [[torch.full((1, 2, 3), float(len(text))), {}]],
        encode_image=lambda vae, image: image, decode_image=lambda vae, latent: latent,
    )  # fmt: skip
    prior = SimpleNamespace(host=host, clip=None, vae=None, kept=lambda name, made: made())
    asked = []

    def draw(positive, negative, latent, seed):
        asked.append((positive[0][0][:, 0, 0].tolist(), len(negative[0][0]), latent["samples"].shape, seed))
        return latent

    pictures, wanted = Judge(prior, "plain", 48).drawn_together(draw, 2, 60)
    captions = [float(len(digits.caption(digit))) for digit in wanted.tolist()]
    assert wanted.bincount().tolist() == [6] * 10 and len(pictures) == 60
    assert [each for part in asked for each in part[0]] == captions
    assert [part[1:] for part in asked] == [(1, (50, 4, 6, 6), 2000), (1, (10, 4, 6, 6), 2001)]


def _bench(setting):
    """A bench that trains and draws nothing, and the steps that it was asked to train to."""
    bench, trained = object.__new__(ablation.Bench), []
    bench.setting, bench.model = setting, "the prior"

    def train(method, seed, name, steps):
        trained.append((name, steps))
        return steps

    bench.trained, bench._loss_before = train, lambda method, seed: 0.5
    bench.validation = lambda name: {str(setting.steps): 0.25}
    bench._quality = lambda model, seed, steps, cfg, name: {"model": model, "cfg": cfg}
    return bench, trained


def test_a_training_is_measured_after_each_part():
    bench, trained = _bench(ablation.Setting(steps=60, parts=3, unguided=True, sample_steps=(10,), size=48))
    found = bench.run("diffusion", 1)
    assert trained == [("golden_48_diffusion_1", steps) for steps in (20, 40, 60)]
    assert found["validation"] == {"0": 0.5, "60": 0.25}
    assert {step: each["samples"]["10"]["model"] for step, each in found["after"].items()} == {
        "20": 20, "40": 40, "60": 60,
    }  # fmt: skip
    assert found["samples"]["10"] == {"model": 60, "cfg": 3.0} and found["unguided"]["10"] == {"model": 60, "cfg": 1.0}


def test_the_prior_itself_is_not_trained():
    bench, trained = _bench(ablation.Setting())
    found = bench.run("base", 0)
    assert not trained and "after" not in found and "unguided" not in found
    assert found["samples"]["25"]["model"] == "the prior" and found["validation"] == {"0": 0.5}


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="50 steps cannot be split into 3 equal parts"):
        ablation.Setting(steps=50, parts=3)
    with pytest.raises(ValueError, match="the method 'magic' is none of base, diff2flow"):
        ablation.ablation(tmp_path, tmp_path, ablation.Setting(), (0,), ["magic"])


def test_every_kind_of_run_has_its_settings(context):
    for kind in (context, replace(context, quick=False), replace(context, quick=False, full=True)):
        continued, resolution = adaptation.continued_setting(kind), adaptation.resolution_setting(kind)
        assert continued.size == 64 and resolution.size == adaptation.SMALLER and resolution.parts > 1
        assert continued.style == resolution.style == "plain" and continued.unguided and resolution.unguided
        for stage in adaptation.STAGES:
            assert json.loads(json.dumps(stage.settings(kind)))["methods"][0] == "base"
    quick, normal = (adaptation.resolution_setting(replace(context, quick=quick)) for quick in (True, False))
    assert quick.steps < normal.steps and quick.prior == "quick" and normal.prior == "digits"


@pytest.mark.parametrize("name", ["continued", "resolution", "ablation"])
def test_a_report_becomes_a_result_and_a_section(context, monkeypatch, tmp_path, name):
    stage = {each.name: each for each in adaptation.STAGES}[name]
    asked, path = [], tmp_path / "ablation.json"

    def measured(models, out, setting, seeds, methods, device):
        asked.append((out.name, seeds, methods))
        path.write_text(json.dumps(_result(setting, {method: DISTANCES[method] for method in methods})))
        return path

    monkeypatch.setattr(adaptation.bench, "ablation", measured)
    result = stage.run(replace(context, quick=False))
    assert asked == [(name, (0, 1, 2), adaptation.METHODS[name])]
    assert result["numbers"]["diff2flow, with guidance, Fréchet"]["better"] == "smaller"
    assert result["numbers"]["base, held-out loss"]["value"] == 9.0
    section = stage.render(json.loads(json.dumps(result)))
    for part in section.parts:
        if isinstance(part, Plot):
            save_plot(part, tmp_path / f"{part.name}.png")
            assert (tmp_path / f"{part.name}.png").stat().st_size > 5000
    others = [other for other in ("base", "diffusion", "flow_matching") if other in adaptation.METHODS[name]]
    assert [claim.holds for claim in section.claims] == [other != "diffusion" for other in others] * 2


def _said(distances, seeds=3):
    setting = ablation.Setting(unguided=True, parts=2)
    section = adaptation_shown.continued(_result(setting, distances, seeds))
    return [claim.holds for claim in section.claims], " ".join(
        part.text for part in section.parts[1:] if isinstance(part, Text)
    )


def test_the_words_follow_the_numbers():
    _, text = _said(DISTANCES)
    assert "worse than diff2flow: base with guidance, flow_matching with guidance, base without" in text
    assert "no different by more than the deviation: diffusion with guidance, diffusion without guidance." in text
    assert "loss after diff2flow is the same, within the deviation, as after diffusion" in text
    assert "Tried, too: diff2flow, velocity weighting; base's Fréchet distance over its is 4.500" in text
    assert "Tried, too: 120 steps; base's Fréchet distance over diff2flow's is 3.000" in text
    assert "Why the base is not beaten" not in text and "Why diffusion is not beaten" in text
    holds, text = _said({**DISTANCES, "diff2flow": 20.0})
    assert "better: base with guidance, diffusion with guidance" in text and "is higher than after" in text
    assert holds == [False, False, True] * 2 and "Why the base is not beaten" in text


def test_a_base_that_is_nearer_in_a_new_style_is_compared_in_pixels():
    result = _result(ablation.Setting(unguided=True, parts=2), DISTANCES)
    cells = result["summary"]["base"]
    cells["unguided/25/frechet_features"], cells["unguided/25/frechet_pixels"] = _cell(2.0), _cell(18.0)
    text = " ".join(part.text for part in adaptation_shown.ablation(result).parts if isinstance(part, Text))
    assert "better: base without guidance" in text and "the classifier sees shapes and no colours" in text
    assert "In pixels, where colours count, the base's distance over diff2flow's is 3.000 ± 0.105 with" in text
    assert "and 6.000 ± 0.203 without guidance." in text


def test_one_seed_says_nothing():
    holds, text = _said(DISTANCES, seeds=1)
    assert holds == [None] * 6 and text == "One seed: no verdict."


def test_quality_over_training_begins_with_the_prior(context):
    setting = adaptation.resolution_setting(replace(context, quick=False))
    plot = adaptation_shown.resolution(_result(setting, DISTANCES)).parts[1]
    lines = {line.label: line for line in plot.lines}
    assert lines["diff2flow, with guidance"].x == [0, 30, 60]
    assert lines["diff2flow, with guidance"].y == [9.0, 3.0, 3.0]
    assert lines["flow_matching, without guidance"].x == [30, 60]
