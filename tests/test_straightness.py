"""Straightness: exact on fields with known paths; the nodes draw what Diff2Flow Sampler draws."""

import math

import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.hosts.headless.host import HeadlessHost
from diff2flow_nodes.nodes import Diff2FlowModel, Diff2FlowSampler, Diff2FlowStepsGrid, Diff2FlowStraightness
from diff2flow_nodes.samplers.straightness import PathMeter, straightness
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint
from diff2flow_nodes.training.plot import straightness_plot
from diff2flow_nodes.training.side_by_side import side_by_side


def _walked(velocity, x, steps, first=1.0):
    """The meter on a field given as velocity(x, t)."""
    meter = PathMeter()
    sigmas = torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)
    end = meter(lambda x, sigma: x + sigma.reshape(-1, 1) * velocity(x, 1.0 - sigma[0]), x, sigmas)
    return meter.found, end


def test_straight_paths_have_no_bends():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    speed = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found, end = _walked(lambda x, t: speed.expand_as(x), x, 7, first=0.9)
    assert found.mean < 1e-12 and found.relative < 1e-12 and found.speed == pytest.approx(float((speed**2).mean()))
    torch.testing.assert_close(end, x + 0.9 * speed)
    assert found.times[0] == pytest.approx(0.1) and float(found.lengths.sum()) == pytest.approx(0.9)


def test_an_accelerated_path_bends_as_calculated():
    """velocity = 2 t: the chord's is 1, S(t) = (1 - 2 t)², whose mean over [0, 1] is 1/3, by N steps plus 2/(3 N²)."""
    steps = 40
    found, _ = _walked(lambda x, t: torch.full_like(x, 2.0 * float(t)), torch.zeros(2, 3, dtype=torch.float64), steps)
    t = torch.arange(steps, dtype=torch.float64) / steps
    chord = float((2 * t).mean())
    torch.testing.assert_close(found.bends, (chord - 2 * t) ** 2, atol=1e-6, rtol=1e-5)
    assert found.mean == pytest.approx(1 / 3, rel=2e-2)


def test_a_turning_path_bends_as_calculated():
    """dx/dt = w J x turns by w: |chord velocity|² = |x|² (2 sin(w/2))², and S is w² minus that, for |x| = 1."""
    turn = math.pi / 2
    rotation = torch.tensor([[0.0, -turn], [turn, 0.0]], dtype=torch.float64)
    found, _ = _walked(lambda x, t: x @ rotation.T, torch.tensor([[1.0, 0.0]], dtype=torch.float64), 4000)
    chord = (2 * math.sin(turn / 2)) ** 2
    assert found.speed == pytest.approx(chord / 2, rel=1e-3)
    assert found.mean == pytest.approx((turn**2 - chord) / 2, rel=1e-2)
    assert found.relative == pytest.approx((turn**2 - chord) / chord, rel=1e-2)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="velocities must be"):
        straightness(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3))


def test_pictures_stand_side_by_side():
    one, two = torch.zeros(2, 16, 24, 3), torch.ones(2, 16, 24, 3)
    picture = side_by_side([("1 step", one), ("2 steps", two)])
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.min() >= 0 and picture.max() <= 1
    height, width = picture.shape[1:3]
    assert torch.equal(picture[0, height - 18 : height - 2, 2:26], one[1])
    assert torch.equal(picture[0, height - 18 : height - 2, width - 26 : width - 2], two[1])
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([("a", one), ("b", two[:1])])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root, before = tmp_path_factory.mktemp("straight"), list(hosts._chosen)
    (root / "models" / "checkpoints").mkdir(parents=True)
    make_checkpoint(root / "models" / "checkpoints" / "tiny.safetensors")
    host = HeadlessHost(root / "models", root / "input", root / "output")
    hosts.use(host)
    model, clip, vae = host.load_checkpoint("tiny.safetensors")
    texts = [host.encode_text(clip, words) for words in ("a fox", "ugly")]
    yield host, model, vae, texts, {"samples": torch.zeros(2, 4, 8, 8)}
    hosts._chosen[:] = before


def test_the_node_measures_the_paths_of_the_sampler(loaded):
    _, model, _, texts, latent = loaded
    mean, relative, plot, report, ends = Diff2FlowStraightness().measure(model, *texts, latent, 3, 4.0, 12)
    [drawn] = Diff2FlowSampler().sample(model, *texts, latent, 3, 12, 4.0, "euler", 1.0, "auto")
    torch.testing.assert_close(ends["samples"], drawn["samples"], atol=1e-4, rtol=1e-4)
    assert 0 < relative < math.inf and 0 < mean < math.inf and f"{mean:.4g}" in report
    assert plot.shape[0] == 1 and plot.shape[3] == 3
    [patched] = Diff2FlowModel().patch(model, "auto", "auto", "auto", 1.0)
    again = Diff2FlowStraightness().measure(patched, *texts, latent, 3, 4.0, 12)
    assert again[0] == pytest.approx(mean, rel=1e-5)


def test_the_grid_shows_what_the_sampler_draws(loaded):
    host, model, vae, texts, latent = loaded
    [picture] = Diff2FlowStepsGrid().draw(model, *texts, latent, 3, 4.0, vae, "1, 3")
    columns = []
    for steps, title in ((1, "1 step"), (3, "3 steps")):
        [drawn] = Diff2FlowSampler().sample(model, *texts, latent, 3, steps, 4.0, "euler", 1.0, "auto")
        columns.append((title, host.decode_image(vae, drawn["samples"])))
    assert torch.equal(picture, side_by_side(columns))
    assert not torch.equal(columns[0][1], columns[1][1])


@pytest.mark.parametrize("counts", ["", "4, x", "0", "2.5"])
def test_a_bad_list_of_steps_is_named_before_anything_is_loaded(counts):
    message = "step_counts must be numbers of at least 1 with commas between"
    assert message in str(Diff2FlowStepsGrid.VALIDATE_INPUTS(counts))
    with pytest.raises(ValueError, match=f"Diff2Flow Steps Grid: {message}"):
        Diff2FlowStepsGrid().draw(None, None, None, None, 0, 1.0, None, counts)
    assert Diff2FlowStepsGrid.VALIDATE_INPUTS("1, 2; 25") is True and Diff2FlowStepsGrid.VALIDATE_INPUTS(None) is True


def test_the_plot_of_a_straight_path_can_be_drawn():
    found, _ = _walked(lambda x, t: torch.ones_like(x), torch.zeros(1, 2, dtype=torch.float64), 3)
    assert straightness_plot(found).shape[0] == 1
