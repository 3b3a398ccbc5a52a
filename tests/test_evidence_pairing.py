"""The stages on pairing and on black and white images: what they measure, and that their words follow the numbers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from diff2flow_nodes.bench import black_white as pictures
from diff2flow_nodes.bench.evidence.pictures import save_plot
from diff2flow_nodes.bench.evidence.registry import STAGES
from diff2flow_nodes.bench.evidence.section import Plot, Text
from diff2flow_nodes.bench.evidence.stage import Context
from diff2flow_nodes.bench.evidence.stages import black_white, pairing
from diff2flow_nodes.bench.tiny_taesd import LATENT_SCALE


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "models", tmp_path / "out", seeds=(0,))


def _cell(mean, deviation=0.01, seeds=3):
    return {"mean": mean, "deviation": deviation, "seeds": seeds}


def _shown(section, tmp_path):
    """Verdicts by claim, and all paragraphs."""
    for part in section.parts:
        if isinstance(part, Plot):
            save_plot(part, tmp_path / f"{part.name}.png")
    words = " ".join(part.text for part in section.parts if isinstance(part, Text))
    return [claim.holds for claim in section.claims], words


def _pairing_result(context, straight, frechet, share, seeds=3):
    setting = json.loads(json.dumps(pairing._settings(context)))
    means = {}
    for name, straightness, distance in zip(pairing.PAIRINGS, straight, frechet, strict=True):
        cells = {"straightness/mean": straightness, "seconds_a_step": 0.3}
        cells |= {f"validation/{step}": 0.5 for step in (40, 80, 120)}
        cells |= {f"samples/{n}/frechet_features": distance for n in (25, 4, 2)}
        cells |= {f"samples/{n}/accuracy": 0.9 for n in (25, 4, 2)}
        means[name] = {key: _cell(value, seeds=seeds) for key, value in cells.items()}
    done = {f"{size}/{what}": _cell(0.97) for size in (1, 4, 16, 64) for what in ("left", "told")}
    cost = {"small": share * 0.3, "large": 0.01, "share": share}
    return {"setting": setting, "summary": means, "pairing": done, "cost": cost}


def test_pairing_is_called_what_it_is(context, tmp_path):
    verdicts, words = _shown(pairing.render(_pairing_result(context, (0.30, 0.20), (9.0, 9.005), 0.001)), tmp_path)
    assert verdicts == [True, False, False, True]
    assert "better: straightness; within the deviation: Fréchet" in words and "takes 3.0% off" in words
    verdicts, words = _shown(pairing.render(_pairing_result(context, (0.30, 0.40), (9.0, 12.0), 0.1)), tmp_path)
    assert verdicts == [False] * 4 and "worse: straightness, Fréchet distance in 25 steps" in words
    verdicts, words = _shown(pairing.render(_pairing_result(context, (0.3, 0.2), (9.0, 1.0), 0.1, 1)), tmp_path)
    assert verdicts[:3] == [None] * 3 and "one seed says nothing" in words


def test_the_more_is_paired_the_less_distance_is_left_and_the_more_noises_tell_their_caption():
    draw = torch.Generator().manual_seed(1)
    captions = ["one", "two"] * 32
    latents = torch.randn(64, 4, 2, 2, generator=draw)
    latents[::2] += 3.0
    latents /= LATENT_SCALE
    data = SimpleNamespace(
        batch=lambda chosen: SimpleNamespace(latent=latents[chosen]), captions=lambda: iter(captions)
    )
    bench = SimpleNamespace(train=data, setting=SimpleNamespace(images=64))
    found = pairing.what_pairing_does(bench, 0)
    assert 1.0 == found["1"]["left"] > found["4"]["left"] > found["16"]["left"] > found["64"]["left"] > 0.3
    assert found["1"]["told"] == pytest.approx(0.5, abs=0.2) and found["64"]["told"] > 0.8


def test_the_cost_is_that_of_one_pairing():
    cost = pairing.seconds_of(4)
    assert 0.0 < cost["small"] < 0.1 and 0.0 < cost["large"] < 1.0


def test_brightness_says_mean_spread_and_error():
    levels = torch.tensor([0.1, 0.3])
    found = pictures.brightness(levels.reshape(2, 1, 1, 1).expand(2, 8, 8, 3), torch.full((8, 8, 3), 0.1))
    assert found == pytest.approx({"mean": 0.2, "by_noise": 0.2 / 2**0.5, "error": 0.1})
    assert pictures.uniform(1.0).shape == (1, 64, 64, 3) and pictures.prompt("black") == "a black image"


def _colour_result(context, errors, read=0.95, seeds=3):
    setting = json.loads(json.dumps(black_white._settings(context)))
    means = {}
    for method in (pictures.BASE, *pictures.METHODS):
        cells = {}
        for steps in setting["sample_steps"]:
            for cfg in setting["cfgs"]:
                for colour in pictures.COLOURS:
                    key = f"{steps} steps, CFG {cfg:g}/{colour}"
                    cells |= {f"{key}/mean": 0.5, f"{key}/by_noise": 0.1, f"{key}/error": errors.get(method, 0.3)}
            cells |= {f"digits, {steps} steps/accuracy": read, f"digits, {steps} steps/frechet_pixels": 4.0}
        means[method] = {key: _cell(value, seeds=seeds) for key, value in cells.items()}
    return {"setting": setting, "bound": {"black": 0.0, "white": 0.985}, "summary": means}


@pytest.mark.parametrize(
    ("native", "full", "holds", "said"),
    [
        (0.1, 0.02, True, "As in the paper"),
        (0.02, 0.03, True, "the full range is no nearer than the native one"),
        (0.4, 0.4, False, "does not show here"),
    ],
)
def test_black_and_white_is_called_what_it_is(context, tmp_path, native, full, holds, said):
    errors = {"diffusion": 0.2, "diff2flow, native range": native, "diff2flow, full range": full}
    verdicts, words = _shown(black_white.render(_colour_result(context, errors)), tmp_path)
    assert verdicts == [holds] * 4 + [True] and said in words
    assert (" within the goal." in words) == holds and ("none within the goal" in words) != holds
    verdicts, words = _shown(black_white.render(_colour_result(context, errors, 0.5, 1)), tmp_path)
    assert verdicts == [None] * 5 and "One seed says nothing" in words and said not in words


@pytest.mark.parametrize(("diffusion", "told"), [(0.2, True), (0.03, False)])
def test_a_colour_that_diffusion_reaches_too_is_measured_without_guidance(context, tmp_path, diffusion, told):
    errors = {"diffusion": diffusion, "diff2flow, full range": 0.02}
    verdicts, words = _shown(black_white.render(_colour_result(context, errors)), tmp_path)
    assert ("nothing is to be told" not in words) == told
    assert told or "At 25 steps, CFG 1 the error after diffusion finetuning is 0.030" in words


def test_quick_runs_are_small_and_in_the_registry(tmp_path):
    quick = Context(tmp_path, tmp_path, quick=True)
    for stage in (pairing, black_white):
        assert stage.STAGE in STAGES and json.dumps(stage.STAGE.settings(quick))
        assert stage.setting_of(quick).steps < stage.setting_of(Context(tmp_path, tmp_path)).steps
        assert stage.setting_of(quick).prior == "quick"
