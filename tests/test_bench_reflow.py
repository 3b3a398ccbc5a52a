"""The report on reflow: means over seeds, tables, goals that can be missed; DPM-Solver++ against Euler."""

import pytest
import torch

from diff2flow_nodes.bench.dpm_solver import dpm_solver
from diff2flow_nodes.bench.reflow_table import goals, markdown
from diff2flow_nodes.bench.summary import ratio, summary
from diff2flow_nodes.hosts.headless.host import HeadlessHost

STEPS = (25, 4, 2, 1)


def _run(distance, straightness):
    cell = {"accuracy": 0.9, "frechet_features": distance, "frechet_pixels": 0.1, "rmse_to_teacher": 0.2}
    return {
        "samples": {str(count): dict(cell) for count in STEPS},
        "straightness": {"mean": straightness, "relative": 0.1},
    }


def test_means_and_deviations_are_those_of_the_seeds():
    found = summary({"a, b/0": {"x": {"y": 1.0}}, "a, b/1": {"x": {"y": 3.0}}, "c/0": {"x": {"y": 5.0}}})
    deviation = pytest.approx(2**0.5)
    assert found["a, b"]["x/y"] == {"mean": 2.0, "deviation": deviation, "seeds": 2, "values": [1.0, 3.0]}
    assert found["c"]["x/y"] == {"mean": 5.0, "deviation": 0.0, "seeds": 1, "values": [5.0]}


def test_ratios_are_compared_seed_by_seed():
    runs = {
        f"{name}/{seed}": {"x": scale * seed} for name, scale in (("one", 2.2), ("two", 2.0)) for seed in (10, 2, 1)
    }
    one, two = (cells["x"] for cells in summary(runs).values())
    assert one["values"] == pytest.approx([2.2, 4.4, 22.0]) and one["deviation"] > one["mean"]
    assert ratio(one, two) == pytest.approx((1.1, 0.0))
    without = [{key: cell[key] for key in ("mean", "deviation", "seeds")} for cell in (one, two)]
    assert ratio(*without) == pytest.approx((1.1, 1.1 * 2**0.5 * one["deviation"] / one["mean"]))


def test_goals_hold_or_do_not():
    runs = {"base Euler/0": _run(10.0, 1.0), "base DPM-Solver++/0": _run(40.0, 1.0), "fast/0": _run(11.0, 0.1)}
    lines = goals(summary(runs))
    held = [line.endswith(": holds") for line in lines]
    assert held == [False, True, True, False, True, True]
    assert "ours at 4 steps over the teacher at 25: 1.100, goal ≤ 1.05: does not hold" in lines[0]
    text = markdown({"sample_steps": STEPS, "pairs": 3}, summary(runs))
    assert (
        "| fast | 11.00 ± 0.00 |" in text
        and "pairs 3" in text
        and "| method | 25 steps | 4 steps | 2 steps | 1 step |" in text
    )


def test_the_last_step_of_dpm_solver_is_eulers(tmp_path):
    """One step from the terminal goes to what the denoiser says; more steps follow a field that has one answer."""
    host = HeadlessHost(tmp_path, tmp_path, tmp_path)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for steps in (1, 8):
        sampler, sigmas = dpm_solver(host, steps)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and sigmas[0] == pytest.approx(14.61, abs=0.01)
        end = sampler.function(lambda x, sigma: torch.full_like(x, 0.5), x * sigmas[0], sigmas)
        torch.testing.assert_close(end, torch.full_like(x, 0.5), atol=1e-4, rtol=0)


def test_dpm_solver_converges_to_the_path_of_gaussian_data(tmp_path):
    """Data of deviation s: x_data_hat = x s²/(s² + sigma²), whose path ends at x s/sqrt(s² + sigma_max²)."""
    host, deviation = HeadlessHost(tmp_path, tmp_path, tmp_path), 0.5

    def denoiser(x, sigma):
        return x * deviation**2 / (deviation**2 + sigma.reshape(-1, 1) ** 2)

    errors = []
    for steps in (10, 20, 40):
        sampler, sigmas = dpm_solver(host, steps)
        x = torch.full((1, 1), float(sigmas[0]))
        exact = float(x) * deviation / (deviation**2 + float(sigmas[0]) ** 2) ** 0.5
        errors.append(abs(float(sampler.function(denoiser, x, sigmas)) - exact))
    assert errors[2] < errors[1] / 2 < errors[0] / 4
