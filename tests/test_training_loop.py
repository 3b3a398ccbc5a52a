"""The loop: it learns, repeats itself to the bit, and loses nothing however it ends."""

import pytest
import torch

from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, TinyNetwork, tiny_dataset
from diff2flow_nodes.training import draws
from diff2flow_nodes.training.layers import GROUPS, LoraSettings
from diff2flow_nodes.training.loop import NonFiniteError, train
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.settings import TrainSettings

LORA = LoraSettings(groups=GROUPS, rank=8, alpha=8.0, ends_in_full=True)


class Interrupted(BaseException):
    """As ComfyUI's newer InterruptProcessingException: no Exception."""


def _train(folder, backbone=None, lora=LORA, progress=None, **settings):
    """What was saved: (state, losses), [] if nothing was."""
    saved = []
    backbone = backbone or TinyBackbone()
    settings = TrainSettings(**{"steps": 5, "batch_size": 4, "learning_rate": 1e-2, **settings})

    def save(adapters, losses):
        saved.append((adapters.state(), list(losses)))

    try:
        train(backbone, tiny_dataset(folder), lora, settings, progress or SilentProgress(), save)
    except BaseException as error:
        error.saved = saved
        raise
    return saved


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("objective", ["diff2flow", "diffusion"])
def test_the_loss_falls_on_three_images(tmp_path, prediction, objective):
    backbone = TinyBackbone(prediction)
    [(_, losses)] = _train(tmp_path, backbone, steps=80, batch_size=8, objective=ObjectiveSettings(objective))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert set(backbone.batch_sizes) == {8} and len(backbone.batch_sizes) == 80


def test_the_same_seed_trains_the_same_lora_to_the_bit(tmp_path):
    torch.manual_seed(1)
    [(one, losses)] = _train(tmp_path / "a", seed=3)
    torch.manual_seed(2)
    [(two, again)] = _train(tmp_path / "b", seed=3)
    [(three, _)] = _train(tmp_path / "c", seed=4)
    assert losses == again and all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], three[key]) for key in one)


def test_the_network_is_afterwards_what_it_was(tmp_path):
    backbone = TinyBackbone()
    weights = {name: (p, p.clone(), p.requires_grad) for name, p in backbone.module.named_parameters()}
    modules = dict(backbone.module.named_modules())
    _train(tmp_path, backbone)
    assert dict(backbone.module.named_modules()) == modules
    for name, p in backbone.module.named_parameters():
        assert p is weights[name][0] and torch.equal(p, weights[name][1]) and p.requires_grad == weights[name][2]
        assert p.grad is None


def test_it_trains_inside_inference_mode(tmp_path):
    backbone = TinyBackbone()
    with torch.inference_mode():
        [(_, losses)] = _train(tmp_path, backbone)
    assert len(losses) == 5


@pytest.mark.parametrize("error", [Interrupted(), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_interruption_saves_what_is_done_and_goes_on(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        _train(tmp_path / "a", progress=SilentProgress(3, error))
    [(state, losses)] = caught.value.saved
    [(until, expected)] = _train(tmp_path / "b", steps=3)
    assert losses[:3] == expected and len(losses) == 3
    assert all(torch.equal(state[key], until[key]) for key in until)


def test_an_error_in_the_network_saves_the_step_before_it(tmp_path):
    class Failing(TinyBackbone):
        def __call__(self, *args):
            if len(self.batch_sizes) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(*args)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        _train(tmp_path, Failing())
    [(_, losses)] = caught.value.saved
    assert len(losses) == 3


def test_an_interruption_before_the_first_step_saves_nothing(tmp_path):
    with pytest.raises(Interrupted) as caught:
        _train(tmp_path, progress=SilentProgress(0, Interrupted()))
    assert caught.value.saved == []


class Exploding(TinyBackbone):
    """Its output is NaN, or only its gradient, from the call `at` on."""

    def __init__(self, at, what):
        super().__init__()
        self._at, self._what = at, what

    def __call__(self, *args):
        output = super().__call__(*args)
        if len(self.batch_sizes) <= self._at:
            return output
        if self._what == "loss":
            return output * float("nan")
        return output + (output - output.detach()).abs().sqrt()  # 0, its gradient 0 * inf


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_what_is_not_finite_stops_at_its_step_with_the_weights_before_it(tmp_path, what, at):
    with pytest.raises(NonFiniteError, match=rf"{what} became nan.* at step {at + 1} of 5") as caught:
        _train(tmp_path / "a", Exploding(at, what))
    if at == 0:
        assert caught.value.saved == []
        return
    [(state, losses)] = caught.value.saved
    [(good, expected)] = _train(tmp_path / "b", steps=at)
    assert losses == expected and all(torch.equal(state[key], good[key]) for key in good)


def test_progress_is_told_of_every_step(tmp_path):
    progress = SilentProgress()
    _train(tmp_path, progress=progress, steps=4)
    assert [done for done, _ in progress.updates] == [0, 1, 2, 3, 4]
    assert "M parameters" in progress.updates[0][1]
    assert "loss" in progress.updates[-1][1] and "it/s" in progress.updates[-1][1]


def test_a_dataset_of_another_model_is_refused(tmp_path):
    settings, nothing = TrainSettings(steps=1), SilentProgress()
    with pytest.raises(ValueError, match="text embeddings are 8 wide, the model takes 6"):
        train(TinyBackbone(), tiny_dataset(tmp_path / "a", width=8), LORA, settings, nothing, lambda *_: None)
    with pytest.raises(ValueError, match="takes 4 input channels, the dataset's latents have 16"):
        train(TinyBackbone(), tiny_dataset(tmp_path / "b", channels=16), LORA, settings, nothing, lambda *_: None)


def test_half_precision_cast_trains(tmp_path):
    [(state, losses)] = _train(tmp_path, precision="bf16", steps=3)
    assert len(losses) == 3 and all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**{"steps": 1, **values})


def test_warm_up_rises_to_the_rate_and_stays():
    settings = TrainSettings(steps=10, learning_rate=1.0, warmup_steps=4)
    assert [settings.learning_rate_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_every_item_is_seen_once_an_epoch_and_batches_are_a_function_of_seed_and_step():
    five = (tuple(range(5)),)
    batches = [draws.batch_indices(five, 3, seed=1, step=step) for step in range(10)]
    flat = [index for batch in batches for index in batch]
    assert all(sorted(flat[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 30, 5))
    assert draws.batch_indices((tuple(range(5)),), 3, seed=1, step=7) == batches[7]
    assert [draws.batch_indices(five, 3, seed=2, step=step) for step in range(10)] != batches
    assert sorted(draws.batch_indices(((0, 1),), 4, seed=0, step=0)) == [0, 0, 1, 1]


def test_a_network_without_a_chosen_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer of this network"):
        backbone = TinyBackbone(network=torch.nn.ModuleDict({"first": TinyNetwork().first}))
        backbone.layer_names = lambda: {"first": "conv_in"}
        _train(tmp_path, backbone, LoraSettings())
