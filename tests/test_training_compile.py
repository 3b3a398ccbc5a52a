"""torch.compile: the order in which a run uses it. The compiler itself takes minutes and is not started here."""

import torch
from torch import nn

from diff2flow_nodes.tests.training_fakes import SilentProgress, tiny_job
from diff2flow_nodes.training import finetune as finetuning
from diff2flow_nodes.training.settings import OptimizerSettings


def test_compiled_after_the_estimate_and_undone(tmp_path, monkeypatch):
    order = []
    estimate = finetuning.estimate

    def compiled(self, *args, **kwargs):
        order.append("compile")
        self._compiled_call_impl = lambda *inputs: order.append("call") or self._call_impl(*inputs)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    monkeypatch.setattr(finetuning, "estimate", lambda *a: order.append("estimate") or estimate(*a))
    job = tiny_job(tmp_path / "a", optimizer=OptimizerSettings(compile=True))
    result = finetuning.finetune(job, SilentProgress())
    assert order == ["estimate", "compile"] + ["call"] * 5
    assert job.backbone.module._compiled_call_impl is None
    plain = finetuning.finetune(tiny_job(tmp_path / "b"), SilentProgress())
    assert all(torch.equal(result.state[key], plain.state[key]) for key in plain.state)
