"""Memory: the estimate is what autograd keeps, checkpointing and accumulation need less and compute the same."""

import gc

import pytest
import torch
from torch import nn

from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone, TinyNetwork, tiny_job
from diff2flow_nodes.training import checkpointing, memory
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.memory import Estimate, estimate, require_room
from diff2flow_nodes.training.settings import OptimizerSettings, TrainSettings


class ResBlock(nn.Module):
    """Named as ComfyUI's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))

    def forward(self, x):
        return x + self.layers(x)


def _network():
    torch.manual_seed(0)
    return nn.Sequential(*(ResBlock() for _ in range(4)))


def _kept(network, x):
    """What autograd really keeps, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(x).square().mean()
    del loss
    return sum(size for size, _ in kept.values())


def test_the_estimate_is_what_autograd_keeps():
    network, x = _network(), torch.randn(100, 32)
    network[0].requires_grad_(False)
    found = estimate(network, TrainSettings(1), lambda: network(x).square().mean())
    assert found.activations == pytest.approx(_kept(network, x) * 1.15, rel=0.02)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert found.trained == 16 * trained and found.frozen == 4 * sum(p.numel() for p in network[0].parameters())


def test_checkpointing_keeps_less_and_computes_the_same():
    network, x = _network(), torch.randn(100, 32)
    network(x).square().mean().backward()
    plain = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with checkpointing.checkpointed(network, True):
        found = estimate(network, TrainSettings(1), lambda: network(x).square().mean())
        between = _kept(network, x)
        network(x).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), plain, strict=True))
    assert found.activations < 0.5 * 1.15 * _kept(network, x)
    block = _kept(network[0], x) - x.nbytes  # what the loss keeps of the block's output
    assert found.activations == pytest.approx(1.15 * (between + block), rel=0.02)
    assert not any("forward" in vars(module) for module in network.modules())
    unknown = checkpointing.checkpointed(nn.Linear(1, 1), True)
    with pytest.raises(ValueError, match="checkpointing: no known block"), unknown:
        pass


def test_accumulation_is_the_same_training_in_parts(tmp_path):
    whole = finetune(tiny_job(tmp_path / "a", batch_size=4), SilentProgress())
    backbone = TinyBackbone()
    options = OptimizerSettings(accumulation=2)
    parts = finetune(
        tiny_job(tmp_path / "b", backbone, batch_size=4, optimizer=options, keeping={"memory_check": False}),
        SilentProgress(),
    )
    assert backbone.batch_sizes == [2] * 10
    for key, value in whole.state.items():
        torch.testing.assert_close(parts.state[key], value, rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused_with_a_way_out(tmp_path, monkeypatch):
    gib = 2**30
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * gib)
    settings = TrainSettings(1, batch_size=4)
    require_room(Estimate(9 * gib, gib // 2, gib), torch.device("cpu"), settings)
    with pytest.raises(ValueError, match=r"needs about 5.00 GiB.*only 2.00 GiB.*checkpointing on, or raise accum"):
        require_room(Estimate(gib, gib, 3 * gib), torch.device("cpu"), settings)
    with pytest.raises(ValueError, match="lower the LoRA's rank, or choose adamw_8bit"):
        require_room(Estimate(gib, 3 * gib, gib), torch.device("cpu"), settings)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="memory_check"):
        finetune(tiny_job(tmp_path / "a"), SilentProgress())
    assert finetune(tiny_job(tmp_path / "b", keeping={"memory_check": False}), SilentProgress()).losses


def test_free_memory_of_this_machine_is_a_number():
    assert memory.free_memory(torch.device("cpu")) > 2**20


def test_a_network_that_cannot_be_traced_is_trained_without_an_estimate(tmp_path):
    class Untraceable(TinyNetwork):
        def forward(self, x, tau, context):
            return super().forward(x, tau, context) + float(x.detach().sum()) * 0

    assert finetune(tiny_job(tmp_path, TinyBackbone(network=Untraceable())), SilentProgress()).losses


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_of_a_run_stays_in_memory(tmp_path):
    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    found = []
    for number in range(3):
        finetune(tiny_job(tmp_path / str(number), steps=2, optimizer=OptimizerSettings(ema=0.9)), SilentProgress())
        found.append(tensors())
    assert found[0] == found[1] == found[2]
