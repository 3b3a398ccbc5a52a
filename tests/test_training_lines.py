"""The lines that reflow learns: where they begin and end, and what a network trained on them does in one step."""

import pytest
import torch

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.samplers import integrate
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.training.lines import Line, Lines, line_through
from diff2flow_nodes.training.objective import Objective, ObjectiveSettings
from diff2flow_nodes.training.reflow_settings import ReflowSettings

SCHEDULE = NoiseSchedule.scaled_linear()
T_MIN = Alignment(SCHEDULE, "eps").t_range[0]


def lines(t_range="native", steps=10, **reflow):
    settings = ObjectiveSettings(t_range=t_range, reflow=ReflowSettings(**reflow))
    return Lines(Objective(settings, SCHEDULE, "eps"), steps)


@pytest.fixture
def ends():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize(("t_range", "start"), [("native", "terminal"), ("clamped", "terminal"), ("full", "noise")])
def test_one_step_along_a_pairs_line_goes_from_where_sampling_starts_to_the_data(t_range, start, ends):
    x_data, x_noise = ends
    line = lines(t_range).of_pairs(x_data, x_noise)
    flow = FlowParameterization(Alignment(SCHEDULE, "eps"), start)
    times = flow.times(1)
    begin = flow.noisy((1.0 - times[0]), x_noise, torch.zeros_like(x_noise), at_start=True)
    reached = integrate(lambda x, t: line.x_data - line.x_noise, begin, times)
    torch.testing.assert_close(reached, x_data, rtol=0, atol=1e-6)
    if start == "noise":
        assert torch.equal(line.x_noise, x_noise)


def test_a_line_is_known_by_a_point_and_its_velocity(ends):
    x_data, x_noise = ends
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    line = line_through(Line(x_data, x_noise).at(t), t, x_data - x_noise)
    torch.testing.assert_close(line.x_data, x_data)
    torch.testing.assert_close(line.x_noise, x_noise)


def test_a_window_gives_the_chord_of_the_teachers_path(ends):
    """dx/dt = -x: one window from t_0 to t_1, in n Euler steps, multiplies x by (1 - (t_1 - t_0)/n)^n."""
    x_data, x_noise = ends
    made = lines("full", windows=4, window_steps=5)
    t = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    line = made.across_window(lambda x, now: -x, x_data, x_noise, t)
    begin = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    first = Line(x_data, x_noise).at(begin)
    torch.testing.assert_close(line.at(begin), first)
    torch.testing.assert_close(line.at(begin + 0.25), first * (1 - 0.25 / 5) ** 5)


def test_the_first_window_begins_where_sampling_starts_and_the_last_ends_at_the_data(ends):
    x_data, x_noise = ends
    times = []
    made = lines("clamped", windows=2, window_steps=3)
    middle = T_MIN + (1 - T_MIN) / 2
    t = torch.tensor([T_MIN, middle + 1e-9, 1.0], dtype=torch.float64)
    line = made.across_window(lambda x, now: (times.append(now), torch.zeros_like(x))[1], x_data, x_noise, t)
    expected = torch.tensor([T_MIN, middle, middle], dtype=torch.float64)
    torch.testing.assert_close(times[0], expected)
    torch.testing.assert_close(times[2] - times[0], torch.full((3,), (1 - T_MIN) / 3, dtype=torch.float64))
    scale = (T_MIN**2 + (1 - T_MIN) ** 2) ** 0.5
    torch.testing.assert_close(line.at(expected)[0], scale * x_noise[0])
    torch.testing.assert_close(line.at(expected)[1:], Line(x_data, x_noise).at(expected)[1:])


def test_a_network_that_is_right_about_the_line_has_nothing_to_learn_from_itself(ends):
    line = lines("full").of_pairs(*ends)
    t = torch.tensor([0.0, 0.4, 0.95], dtype=torch.float64)
    made = lines("full", consistency=1.0)
    own = made.to_own_prediction(lambda x, now: line.x_data - line.x_noise, line, t)
    torch.testing.assert_close(own.x_data, line.x_data)
    torch.testing.assert_close(own.x_noise, line.x_noise)


def test_a_network_learns_what_it_foresees_one_step_later_and_the_data_at_the_end(ends):
    line = lines("full").of_pairs(*ends)
    t = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    seen = []

    def network(x, now):
        seen.append(now)
        return scale * 2.0 * x

    own = lines("full", consistency=0.5, consistency_steps=4).to_own_prediction(network, line, t)
    later = torch.tensor([0.25, 0.75, 1.0], dtype=torch.float64)
    torch.testing.assert_close(seen[0], later)
    predicted = line.at(later) * (1 + 2 * (1 - later)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(own.x_data[:2], predicted[:2])
    torch.testing.assert_close(own.x_data[2], line.x_data[2])
    torch.testing.assert_close(own.at(t), line.at(t))
    assert not own.x_data.requires_grad


def test_the_consistency_phase_is_the_end_of_a_run():
    made = lines(steps=10, consistency=0.3)
    assert [made.is_consistent(step) for step in (0, 6, 7, 9)] == [False, False, True, True]
    assert not any(lines(steps=10).is_consistent(step) for step in range(10))
    assert lines(steps=10, consistency=1.0).is_consistent(0)


def test_clamped_times_are_often_the_very_start():
    settings = ObjectiveSettings(t_range="clamped", time_distribution="u_shaped")
    objective = Objective(settings, SCHEDULE, "eps")
    t = objective.times(torch.linspace(0, 1, 10001)[:-1])
    first, last = objective.t_span
    assert objective.start == "terminal" and t.min() == pytest.approx(first) and t.max() == pytest.approx(last)
    assert (t <= first + 1e-6).float().mean() > 0.15  # the U shape has a fifth of its mass below t_min


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": -1}, "windows must be at least 0, not -1"),
        ({"window_steps": 0}, "window_steps must be at least 1, not 0"),
        ({"teacher_cfg": float("nan")}, "teacher_cfg must be at least 0, not nan"),
        ({"consistency": 1.5}, "consistency must be from 0 to 1, not 1.5"),
        ({"drop_worst": 1.0}, "drop_worst must be from 0 to below 1, not 1.0"),
        ({"windows": 2, "consistency": 0.1}, "windows and consistency cannot be combined"),
    ],
)
def test_wrong_numbers_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ReflowSettings(**values)


def test_windows_are_for_diff2flow_only():
    with pytest.raises(ValueError, match="objective 'diffusion' cannot be combined with windows"):
        ObjectiveSettings(name="diffusion", reflow=ReflowSettings(windows=4))
