"""torch.compile for real: a training step of a small network through its compiler, which needs one for C++."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_fakes import SilentProgress, TinyBackbone, TinyNetwork, tiny_job

from diff2flow_nodes.training.finetune import Finetuned, finetune
from diff2flow_nodes.training.layers import LoraSettings
from diff2flow_nodes.training.settings import OptimizerSettings


class _WithAttention(TinyNetwork):
    """A convolution, attention to the text, a convolution."""

    def forward(self, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
        h = self.first(x) + self.time(torch.stack([tau, tau * tau], dim=1) / 1e6)[:, :, None, None]
        tokens, text = h.flatten(2).transpose(1, 2), self.inner["text"](context)
        seen = nn.functional.scaled_dot_product_attention(self.inner["q"](tokens), text, text)
        return self.last((tokens + seen).transpose(1, 2).reshape(h.shape))


def _trained(folder: Path, compile: bool) -> tuple[Finetuned, nn.Module]:
    torch.manual_seed(0)
    backbone = TinyBackbone(network=_WithAttention(8))
    lora = LoraSettings(groups=("self_attention", "cross_attention"), rank=2, alpha=2.0, ends_in_full=True)
    job = tiny_job(
        folder, backbone, lora, steps=3, batch_size=2, learning_rate=0.05, optimizer=OptimizerSettings(compile=compile)
    )
    return finetune(job, SilentProgress()), backbone.module


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a compiler for C++")
def test_a_compiled_network_trains_as_the_eager_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no processes of its own, which outlive the test
    monkeypatch.setattr(torch._inductor.config.aot_inductor, "debug_compile", True)  # quicker to compile than to run
    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 1)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, _ = _trained(tmp_path / "eager", False)
    assert not counters["stats"]
    compiled, network = _trained(tmp_path / "compiled", True)
    assert counters["stats"]["calls_captured"] > 10 and not counters["graph_break"]
    assert counters["aot_autograd"]["ok"] >= 1  # the backward pass as well
    assert list((tmp_path / "cache").rglob("*.so"))
    assert network._compiled_call_impl is None
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert eager.losses[-1] != pytest.approx(eager.losses[0], rel=1e-3)
    for key, value in eager.state.items():
        torch.testing.assert_close(compiled.state[key], value, rtol=1e-3, atol=1e-5)
