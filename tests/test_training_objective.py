"""The objective: exact for a perfect network, weighted as it says, with the times it says."""

import pytest
import torch

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.training.objective import MAX_GAIN, Objective, ObjectiveSettings

SCHEDULE = NoiseSchedule.scaled_linear()
T_MIN, T_MAX = Alignment(SCHEDULE).t_range
SHAPE = (6, 4, 3, 3)


class Perfect:
    """Answers what the loss wants to hear, plus a constant error; remembers its timesteps."""

    def __init__(self, prediction, x_data, x_noise, error=0.0):
        self.alignment = Alignment(SCHEDULE, prediction)
        self._x_data, self._x_noise, self._error = x_data, x_noise, error
        self.tau = None

    def __call__(self, x_diff, tau, conditioning):
        self.tau = tau
        t = self.alignment.flow_time(tau)
        alpha, sigma = (c.float()[:, None, None, None] for c in self.alignment.coefficients(t))
        torch.testing.assert_close(x_diff, alpha * self._x_data + sigma * self._x_noise, rtol=1e-4, atol=1e-4)
        v = alpha * self._x_noise - sigma * self._x_data
        return (self._x_noise if self.alignment.prediction == "eps" else v) + self._error


def _pair(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=draw), torch.randn(SHAPE, generator=draw)


def _loss(prediction, error=0.0, **settings):
    x_data, x_noise = _pair()
    network = Perfect(prediction, x_data, x_noise, error)
    objective = Objective(ObjectiveSettings(**settings), SCHEDULE, prediction)
    t = objective.times(torch.linspace(0, 0.999, SHAPE[0]))
    return objective.loss(network, x_data, x_noise, t, {}), t, network


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", ["diff2flow", "diffusion"])
def test_a_perfect_network_has_no_loss(prediction, name):
    loss, _, _ = _loss(prediction, name=name)
    assert loss.shape == (SHAPE[0],) and loss.max() < 1e-8


def test_weightings_of_an_eps_network():
    velocity, t, _ = _loss("eps", 0.1, weighting="velocity")
    eps, _, _ = _loss("eps", 0.1, weighting="eps")
    clamped, _, _ = _loss("eps", 0.1, weighting="clamped")
    torch.testing.assert_close(velocity, 0.01 / t**2, rtol=1e-3, atol=0)
    torch.testing.assert_close(eps, torch.full_like(t, 0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(clamped, 0.01 * (1 / t).clamp(max=MAX_GAIN) ** 2, rtol=1e-3, atol=0)


def test_a_v_network_is_not_clamped():
    velocity, _, _ = _loss("v", 0.1, weighting="velocity")
    clamped, _, _ = _loss("v", 0.1, weighting="clamped")
    assert torch.equal(velocity, clamped) and velocity.max() <= 0.0201


@pytest.mark.parametrize(
    ("settings", "span", "start"),
    [
        ({}, (T_MIN, T_MAX), "terminal"),
        ({"t_range": "full"}, (0.0, 1.0), "noise"),
        ({"name": "diffusion", "t_range": "full"}, (T_MIN, T_MAX), "terminal"),
    ],
)
def test_times_and_start(settings, span, start):
    objective = Objective(ObjectiveSettings(**settings), SCHEDULE, "eps")
    t = objective.times(torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    assert objective.t_span == pytest.approx(span) and objective.start == start
    assert t.min() >= span[0] - 1e-6 and t.max() <= span[1] + 1e-6
    assert t.min() < span[0] + 0.001 and t.max() > span[1] - 0.001
    if settings.get("name") != "diffusion":
        assert t.mean() == pytest.approx(sum(span) / 2, abs=0.01)


def test_diffusion_draws_integer_timesteps_evenly():
    objective = Objective(ObjectiveSettings("diffusion"), SCHEDULE, "eps")
    t = objective.times(0.9995 - torch.arange(1000) / 1000)
    torch.testing.assert_close(objective.alignment.timestep(t), torch.arange(1000.0), rtol=0, atol=1e-2)


def test_the_full_range_is_finite_at_both_ends():
    for prediction in ("eps", "v"):
        x_data, x_noise = _pair()
        objective = Objective(ObjectiveSettings(t_range="full", weighting="velocity"), SCHEDULE, prediction)
        t = torch.tensor([0.0, 1e-7, 0.03, 0.99, 0.9999, 1.0])
        loss = objective.loss(lambda x, tau, c: x, x_data, x_noise, t, {})
        assert torch.isfinite(loss).all()


@pytest.mark.parametrize("field", ["name", "t_range", "weighting", "time_distribution", "loss", "zero_terminal_snr"])
def test_unknown_choices_are_named(field):
    with pytest.raises(ValueError, match="'other'"):
        ObjectiveSettings(**{field: "other"})


def test_naive_flow_matching_takes_the_output_for_the_velocity():
    x_data, x_noise = _pair()
    objective = Objective(ObjectiveSettings("flow_matching"), SCHEDULE, "eps")
    t = objective.times(torch.linspace(0, 0.999, SHAPE[0]))
    seen = {}

    def network(x, tau, conditioning):
        seen.update(x=x, tau=tau)
        return x_data - x_noise + 0.5

    torch.testing.assert_close(objective.loss(network, x_data, x_noise, t, {}), torch.full((SHAPE[0],), 0.25))
    torch.testing.assert_close(seen["tau"], t * 1000)
    over = t[:, None, None, None]
    torch.testing.assert_close(seen["x"], over * x_data + (1 - over) * x_noise)
    assert (objective.t_span, objective.start) == ((0.0, 1.0), "noise")


def test_huber_losses_are_square_at_first_and_linear_later():
    for loss, small, large in (("huber", 0.5 * 0.01**2, 0.1 * (3 - 0.05)), ("pseudo_huber", 0.01**2 / 0.2, 2.9017)):
        for error, expected in ((0.01, small), (3.0, large)):
            found, _, _ = _loss("eps", error, weighting="eps", loss=loss, delta=0.1)
            torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0.02, atol=0)


def test_masked_pixels_do_not_count():
    x_data, x_noise = _pair()
    objective = Objective(ObjectiveSettings(weighting="velocity"), SCHEDULE, "v")
    t = torch.full((SHAPE[0],), 0.5)
    mask = torch.zeros(SHAPE[0], 1, 3, 3)
    mask[:, :, 0] = 0.5
    wrong = torch.zeros_like(x_data)
    wrong[:, :, 1:] = 1e6
    right = Perfect("v", x_data, x_noise)
    loss = objective.loss(lambda x, tau, c: right(x, tau, c) + wrong, x_data, x_noise, t, {}, mask)
    assert loss.max() < 1e-8
    wrong[:, :, 0] = 1.0
    gain = 2.0  # of a v network at t = 1/2: |alpha + sigma|² = 2
    loss = objective.loss(lambda x, tau, c: right(x, tau, c) + wrong, x_data, x_noise, t, {}, mask)
    torch.testing.assert_close(loss, torch.full_like(loss, gain * 0.5 / 3), rtol=1e-4, atol=0)


def test_zero_terminal_snr_changes_the_schedule_and_is_refused_for_eps():
    objective = Objective(ObjectiveSettings(zero_terminal_snr="on"), SCHEDULE, "v")
    assert objective.schedule.is_zero_terminal_snr and objective.t_span[0] < 1e-6 and objective.start == "noise"
    back = Objective(ObjectiveSettings(zero_terminal_snr="off"), objective.schedule, "eps")
    assert back.schedule == SCHEDULE
    with pytest.raises(ValueError, match="zero_terminal_snr cannot be combined with an eps model"):
        Objective(ObjectiveSettings(zero_terminal_snr="on"), SCHEDULE, "eps")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"delta": -0.1}, "delta"),
        ({"logit_spread": -1.0}, "logit_spread"),
    ],
)
def test_numbers_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**values)
