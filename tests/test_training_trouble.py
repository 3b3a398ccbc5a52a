"""What goes wrong inside a step: memory that runs out, and layers that no gradient reaches."""

import pytest
import torch

from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, TinyNetwork, TinyText, tiny_job
from diff2flow_nodes.training.finetune import Watch, finetune
from diff2flow_nodes.training.layers import PRESETS, LoraSettings
from diff2flow_nodes.training.objective import ObjectiveSettings
from diff2flow_nodes.training.settings import OptimizerSettings

WORDS = ["CUDA out of memory. Tried to allocate 2 GiB", "MPS backend out of memory (MPS allocated: 9 GB)"]


class SmallCard(TinyBackbone):
    """Has room for so many items in a call, from the call `since` on."""

    def __init__(self, room, error, since=0):
        super().__init__()
        self.room, self.error, self.since, self.freed = room, error, since, 0

    def __call__(self, x_diff, *rest):
        if len(x_diff) > self.room and len(self.batch_sizes) >= self.since:
            raise self.error
        return super().__call__(x_diff, *rest)

    def free_memory(self):
        self.freed += 1


def _run(path, backbone=None, progress=None, batch_size=4, **changes):
    keeping = {"memory_check": False, **changes.pop("keeping", {})}
    job = tiny_job(path, backbone, keeping=keeping, batch_size=batch_size, **changes)
    return finetune(job, progress or SilentProgress())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(WORDS[0]), RuntimeError(WORDS[1])])
@pytest.mark.parametrize(("room", "calls"), [(2, 2), (3, 2), (1, 4)])
def test_a_batch_that_does_not_fit_is_made_in_smaller_calls(tmp_path, error, room, calls):
    backbone, progress = SmallCard(room, error), SilentProgress()
    made = _run(tmp_path / "a", backbone, progress)
    same = _run(tmp_path / "b", optimizer=OptimizerSettings(accumulation=calls))
    assert backbone.batch_sizes == [4 // calls] * 5 * calls and backbone.freed
    assert made.losses == same.losses and all(torch.equal(made.state[key], same.state[key]) for key in same.state)
    said = [text for _, text in progress.updates if "memory ran out" in text]
    assert f"{4 // calls} in each of {calls} calls, which is the same batch" in said[-1]


def test_memory_may_run_out_late_and_the_run_goes_on_where_it_was(tmp_path):
    backbone = SmallCard(2, torch.OutOfMemoryError(WORDS[0]), since=3)
    made, whole = _run(tmp_path / "a", backbone), _run(tmp_path / "b")
    assert backbone.batch_sizes == [4, 4, 4, 2, 2, 2, 2] and made.losses[:3] == whole.losses[:3]
    assert made.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.parametrize(("room", "goal"), [(0, {}), (2, {"objective": ObjectiveSettings(pairing="optimal_transport")})])
def test_what_cannot_be_split_ends_in_one_sentence_with_the_steps_saved(tmp_path, room, goal):
    backbone = SmallCard(room, torch.OutOfMemoryError(WORDS[0]), since=2)
    with pytest.raises(ValueError, match=r"memory ran out on cpu in step 3 .*checkpointing on, .*2 steps are saved as"):
        _run(tmp_path, backbone, **goal)


def test_samples_that_do_not_fit_are_left_out_and_said(tmp_path):
    def draw(model, flow, text):
        raise torch.OutOfMemoryError(WORDS[0])

    progress = SilentProgress()
    made = _run(tmp_path, progress=progress, watch=Watch(sample_every=2, draw=draw))
    assert len(made.losses) == 5
    assert sum("samples of step" in text for _, text in progress.updates) == 2


class Severed(TinyNetwork):
    """Its query layer is computed by a kernel without a backward pass."""

    def forward(self, x, tau, context):
        query = self.inner["q"]
        self.inner["q"] = _Forward(query)
        try:
            return super().forward(x, tau, context)
        finally:
            self.inner["q"] = query


class _Forward(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]

    def forward(self, x):
        with torch.no_grad():
            return self.layer[0](x)


@pytest.mark.parametrize("name", ["light", "paper-base"])
def test_a_layer_without_gradient_ends_the_run_before_its_first_update(tmp_path, name):
    with pytest.raises(ValueError, match="1 of the trained layers get no gradient .*attn1.to_q; .*SageAttention"):
        _run(tmp_path, TinyBackbone(network=Severed()), lora=PRESETS[name])
    assert not list((tmp_path / "loras").rglob("*"))


def test_a_network_without_any_gradient_ends_the_run_in_the_same_words(tmp_path):
    class Forward(TinyNetwork):
        def forward(self, *inputs):
            with torch.no_grad():
                return super().forward(*inputs)

    with pytest.raises(ValueError, match="of the trained layers get no gradient"):
        _run(tmp_path, TinyBackbone(network=Forward()))


def test_text_layers_behind_the_one_that_is_read_may_be_without(tmp_path):
    class Skipping(TinyText):
        def encode(self, captions):
            self.layers["fc"], kept = torch.nn.Identity(), self.layers["fc"]
            try:
                return super().encode(captions)
            finally:
                self.layers["fc"] = kept

    class Deaf(TinyText):
        def encode(self, captions):
            with torch.no_grad():
                return super().encode(captions)

    lora = LoraSettings(rank=2, text_encoder=True)
    for text in (Skipping(), Deaf()):
        backbone = TinyBackbone()
        backbone.text = text
        if isinstance(text, Skipping):
            assert _run(tmp_path / "a", backbone, lora=lora).losses
        else:
            with pytest.raises(ValueError, match="2 of the trained layers get no gradient .*lora_te"):
                _run(tmp_path / "b", backbone, lora=lora)
