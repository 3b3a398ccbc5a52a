"""The loop: it learns, repeats itself to the bit, and loses nothing however it ends."""

import pytest
import torch

from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, TinyNetwork, tiny_dataset, tiny_job
from diff2flow_nodes.training import draws
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.layers import GROUPS, LoraSettings
from diff2flow_nodes.training.loop import NonFiniteError
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.objective import OBJECTIVES, ObjectiveSettings
from diff2flow_nodes.training.settings import OptimizerSettings, TrainSettings

LORA = LoraSettings(groups=GROUPS, rank=8, alpha=8.0, ends_in_full=True)


class Interrupted(BaseException):
    """As ComfyUI's newer InterruptProcessingException: no Exception."""


def _train(folder, backbone=None, lora=LORA, progress=None, **options):
    return finetune(tiny_job(folder, backbone, lora, **options), progress or SilentProgress())


def _saved(folder):
    """State and number of steps of the one LoRA that was saved; None if there is none."""
    files = list((folder / "loras").iterdir())
    if not files:
        return None
    [file] = files
    state, metadata = load_lora(file)
    return state, int(metadata["ss_steps"])


def _equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls_on_three_images(tmp_path, prediction, objective):
    backbone = TinyBackbone(prediction)
    options = {"objective": ObjectiveSettings(objective), "keeping": {"memory_check": False}}
    losses = _train(tmp_path, backbone, steps=80, batch_size=8, **options).losses
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert set(backbone.batch_sizes) == {8} and len(backbone.batch_sizes) == 80


def test_the_same_seed_trains_the_same_lora_to_the_bit(tmp_path):
    torch.manual_seed(1)
    one = _train(tmp_path / "a", seed=3)
    torch.manual_seed(2)
    two, three = _train(tmp_path / "b", seed=3), _train(tmp_path / "c", seed=4)
    assert one.losses == two.losses and _equal(one.state, two.state) and not _equal(one.state, three.state)


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
    job = tiny_job(tmp_path)
    with torch.inference_mode():
        assert len(finetune(job, SilentProgress()).losses) == 5


@pytest.mark.parametrize("error", [Interrupted(), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_interruption_saves_what_is_done_and_goes_on(tmp_path, error):
    with pytest.raises(type(error)):
        _train(tmp_path / "a", progress=SilentProgress(3, error))
    state, steps = _saved(tmp_path / "a")
    assert steps == 3 and _equal(state, _train(tmp_path / "b", steps=3).state)


def test_an_error_in_the_network_saves_the_step_before_it(tmp_path):
    class Failing(TinyBackbone):
        def __call__(self, *args):
            if len(self.batch_sizes) == 3:
                raise RuntimeError("a broken kernel")
            return super().__call__(*args)

    with pytest.raises(RuntimeError, match="a broken kernel"):
        _train(tmp_path, Failing(), keeping={"memory_check": False})
    assert _saved(tmp_path)[1] == 3


def test_an_interruption_before_the_first_step_saves_nothing(tmp_path):
    with pytest.raises(Interrupted):
        _train(tmp_path, progress=SilentProgress(0, Interrupted()))
    assert _saved(tmp_path) is None


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
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_not_finite_stops_at_its_step_with_the_weights_before_it(tmp_path, what, at, ema):
    options = {"optimizer": OptimizerSettings(ema=ema), "keeping": {"memory_check": False}}
    with pytest.raises(NonFiniteError, match=rf"{what} became nan.* at step {at + 1} of 5"):
        _train(tmp_path / "a", Exploding(at, what), **options)
    if at == 0:
        assert _saved(tmp_path / "a") is None
        return
    state, steps = _saved(tmp_path / "a")
    assert steps == at and _equal(state, _train(tmp_path / "b", steps=at, **options).state)


def test_progress_is_told_of_every_step(tmp_path):
    progress = SilentProgress()
    _train(tmp_path, progress=progress, steps=4)
    assert [done for done, _ in progress.updates] == [0, 1, 2, 3, 4] and progress.closed
    assert "M parameters" in progress.updates[0][1]
    assert "loss" in progress.updates[-1][1] and "it/s" in progress.updates[-1][1]


def test_a_dataset_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text embeddings are 8 wide, the model takes 6"):
        _train(tmp_path / "a", dataset=tiny_dataset(tmp_path / "x", width=8))
    with pytest.raises(ValueError, match="takes 4 input channels, the dataset's latents have 16"):
        _train(tmp_path / "b", dataset=tiny_dataset(tmp_path / "y", channels=16))


def test_half_precision_cast_trains(tmp_path):
    result = _train(tmp_path, optimizer=OptimizerSettings(precision="bf16"), steps=3)
    assert len(result.losses) == 3 and all(torch.isfinite(value).all() for value in result.state.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": 3, "optimizer": OptimizerSettings(accumulation=2)}, "multiple of accumulation"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**{"steps": 1, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"precision": "fp8"}, "precision"),
        ({"name": "sgd"}, "optimizer must be one of adamw"),
        ({"schedule": "step"}, "schedule"),
        ({"ema": 1.0}, "ema must be from 0 to below 1"),
        ({"accumulation": 0}, "accumulation"),
    ],
)
def test_bad_optimizer_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**values)


def test_every_item_is_seen_once_an_epoch_and_batches_are_a_function_of_seed_and_step():
    five = (tuple(range(5)),)
    order = draws.Order(five, 3, seed=1)
    batches = [order.batch(step) for step in range(10)]
    flat = [index for batch in batches for index in batch]
    assert all(sorted(flat[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 30, 5))
    assert draws.Order(five, 3, seed=1).batch(7) == batches[7]
    assert [draws.Order(five, 3, seed=2).batch(step) for step in range(10)] != batches
    assert sorted(draws.Order(((0, 1),), 4, seed=0).batch(0)) == [0, 0, 1, 1]


def test_a_network_without_a_chosen_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer of this network"):
        backbone = TinyBackbone(network=torch.nn.ModuleDict({"first": TinyNetwork().first}))
        backbone.layer_names = lambda: {"first": "conv_in"}
        _train(tmp_path, backbone, LoraSettings())
