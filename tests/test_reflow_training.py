"""Training on pairs: the pair's own noise is what the network sees, and a straight teacher has nothing to learn."""

import pytest
import torch

from diff2flow_nodes.alignment import Alignment, NoiseSchedule
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.tests.reflow_fakes import make, maker
from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, tiny_dataset, tiny_job
from diff2flow_nodes.training import draws
from diff2flow_nodes.training.finetune import Watch, finetune
from diff2flow_nodes.training.objective import Objective, ObjectiveSettings
from diff2flow_nodes.training.teacher import TeacherSettings
from diff2flow_nodes.training.validation import Validation

FULL = ObjectiveSettings(t_range="full")


class Straight(TinyBackbone):
    """A v network whose velocity is that of the lines x_data = A x_noise: exact where alpha and sigma are."""

    slope = 0.25

    def __init__(self):
        super().__init__("v")
        self.alignment = Alignment(self.schedule, "v")

    def __call__(self, x_diff, tau, conditioning):
        t = self.alignment.flow_time(tau)
        alpha, sigma = (c.reshape(-1, 1, 1, 1).float() for c in self.alignment.coefficients(t))
        x_noise = x_diff / (alpha * self.slope + sigma)  # x_diff = alpha x_data + sigma x_noise
        return alpha * x_noise - sigma * self.slope * x_noise


@pytest.fixture
def pairs(tmp_path):
    return make(tmp_path / "pairs", 6, dtype="fp32", seed=5)


def test_the_network_sees_the_line_between_noise_and_latent_of_a_pair(tmp_path, pairs):
    seen = []

    class Watching(TinyBackbone):
        def __call__(self, x_diff, tau, conditioning):
            seen.append((x_diff.detach(), tau, conditioning["context"]))
            return super().__call__(x_diff, tau, conditioning)

    keeping = {"memory_check": False}
    job = tiny_job(tmp_path, Watching(), dataset=pairs, steps=1, keeping=keeping, objective=FULL, seed=3)
    finetune(job, SilentProgress())
    [(x_diff, tau, context)] = seen
    indices = draws.Order(pairs.buckets, 4, 3).batch(0)
    numbers = pairs.pairs[indices].tolist()
    t = draws.uniform(4, 3, 0)
    x_data = torch.cat([pairs.store.latent(pair) for pair in numbers]) * 0.5
    x_noise = torch.stack([torch.randn(4, 4, 4, generator=draws.generator(5, "pair", pair)) for pair in numbers])
    over = t.reshape(-1, 1, 1, 1)
    alignment = Alignment(NoiseSchedule.scaled_linear(), "eps")
    expected = alignment.to_diffusion(over * x_data + (1 - over) * x_noise, t)
    assert torch.equal(x_diff, expected) and torch.equal(tau, alignment.timestep(t))
    assert torch.equal(context, pairs.batch(indices).context)


def test_a_straight_teacher_has_no_loss_on_its_own_pairs(tmp_path):
    flow = FlowParameterization(Alignment(NoiseSchedule.scaled_linear(), "v"), "noise")
    teacher = Straight()
    pairs = make(tmp_path, 8, by=maker(teacher, flow), teacher=TeacherSettings(40, 1.0), dtype="fp32")
    batch = pairs.batch(range(8))
    assert (batch.latent * 0.5 - 0.25 * batch.noise).abs().max() < 0.02  # no network covers t < t_min
    objective = Objective(ObjectiveSettings(weighting="velocity"), teacher.schedule, "v")
    on_pairs = Validation(pairs, objective, 0, 4).losses(teacher)["loss"]
    fresh = torch.randn(batch.noise.shape)
    x_data, t = batch.latent * 0.5, torch.full((8,), 0.5)
    on_fresh = objective.loss(teacher, x_data, fresh, t, {"context": batch.context}).mean()
    assert on_pairs < 1e-3 < 0.1 < on_fresh
    assert objective.loss(teacher, 0.25 * batch.noise, batch.noise, t, {"context": batch.context}).max() < 1e-10


def test_pairs_train_validate_and_go_on(tmp_path, pairs):
    train, held = pairs.split(0.34, 0)
    assert len(train) == 4 and sorted([*train.pairs.tolist(), *held.pairs.tolist()]) == list(range(6))
    watch = Watch(validate_every=2, held_out=held)
    caption_dropout = ObjectiveSettings(caption_dropout=0.5)
    options = {"dataset": train, "watch": watch, "objective": caption_dropout}
    whole = finetune(tiny_job(tmp_path / "a", steps=6, **options), SilentProgress())
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_job(tmp_path / "b", steps=6, **options), SilentProgress(3, KeyboardInterrupt()))
    again = finetune(tiny_job(tmp_path / "b", steps=6, **options), SilentProgress())
    assert all(torch.equal(whole.state[key], again.state[key]) for key in whole.state)
    assert whole.losses == again.losses and "4 pairs of 32×32 px" in whole.metadata["diff2flow.dataset"]
    assert '"pairs": {"n_repeats": 1, "img_count": 4}' in whole.metadata["ss_dataset_dirs"]
    assert whole.metadata["diff2flow.pairing"] == "own noise"
    assert train.identity() != held.identity() != pairs.identity()


def test_pairs_stay_by_themselves(tmp_path, pairs):
    with pytest.raises(ValueError, match="'pairs' holds reflow pairs, which cannot be joined"):
        pairs.joined(tiny_dataset(tmp_path / "images"))
    with pytest.raises(ValueError, match="'pairs' holds reflow pairs, which cannot be joined"):
        tiny_dataset(tmp_path / "images").joined(pairs)
    with pytest.raises(ValueError, match="cannot be held out"):
        pairs.split(1.5, 0)
    assert list(pairs.captions()) == list(pairs.batch(range(6)).captions)


def test_a_reflowed_model_teaches_the_next_round(tmp_path, pairs):
    first = finetune(tiny_job(tmp_path, dataset=pairs, objective=FULL, steps=3), SilentProgress())
    assert first.metadata["diff2flow.start"] == "noise"
    flow = FlowParameterization(Alignment(NoiseSchedule.scaled_linear(), "eps"), "noise")
    second = make(tmp_path / "second", 4, by=maker(flow=flow, model_id="m+lora", loras=[first.metadata]))
    manifest = (tmp_path / "second" / "manifest.json").read_text()
    assert '"start": "noise"' in manifest and "m+lora" in manifest and first.metadata["modelspec.title"] in manifest
    finetune(tiny_job(tmp_path / "b", dataset=second, objective=FULL, steps=2), SilentProgress())
