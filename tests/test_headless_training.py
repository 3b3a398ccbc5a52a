"""The headless host's text encoder under gradients, and its checkpoints after full finetuning."""

import pytest
import torch

from diff2flow_nodes.hosts.headless.host import HeadlessHost
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint
from diff2flow_nodes.training.adapters import trainable
from diff2flow_nodes.training.checkpoint_file import save_checkpoint
from diff2flow_nodes.training.layers import PRESETS, LoraSettings

CAPTIONS = ["a (red:1.3) fox", "a cat, " * 40, "a (red:1.3) fox"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    place = tmp_path_factory.mktemp("headless")
    made = HeadlessHost(place / "models", place / "input", place / "output")
    for family in ("SD1", "SD2"):
        make_checkpoint(made.folder("checkpoints") / f"{family}.safetensors", family)
    return made


def _encoded(host, clip):
    """The captions' contexts, the shorter ones followed by the empty prompt's up to the longest."""
    *contexts, nothing = [host.encode_text(clip, caption)[0][0] for caption in [*CAPTIONS, ""]]
    longest = max(context.shape[1] for context in contexts)
    assert nothing.shape[1] == 77 and longest % 77 == 0
    rows = [[context] + [nothing] * ((longest - context.shape[1]) // 77) for context in contexts]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["SD1", "SD2"])
def test_a_text_encoders_lora_is_what_was_trained(host, family, dora):
    model, clip, _ = host.load_checkpoint(f"{family}.safetensors")
    plain = _encoded(host, clip)
    settings = LoraSettings(groups=(), rank=4, alpha=4.0, dora=dora, text_encoder=True)
    with host.training(model, clip) as backbone, trainable(backbone, settings, seed=0) as adapters:
        context, pooled = backbone.text.encode(CAPTIONS)
        assert torch.equal(context, plain) and len(pooled) == 3
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        context, pooled = backbone.text.encode(CAPTIONS)
        conditioning = backbone.conditioning(context, pooled, torch.zeros(3, 6))
        output = backbone(torch.randn(3, 4, 8, 8), torch.tensor([1.0, 500.0, 900.0]), conditioning)
        (output.square().mean() + pooled.square().mean()).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in adapters.parameters())
        trained, state = context.detach(), adapters.state()
    assert all(key.startswith("lora_te_text_model_encoder_layers_") for key in state)
    tuned = _encoded(host, host.apply_lora(model, clip, state, 1.0, None)[1])
    effect = (trained - plain).abs().max()
    assert (tuned - trained).abs().max() < 0.02 * effect  # merged weights are rounded to half precision
    assert torch.equal(_encoded(host, clip), plain)
    assert not any(p.requires_grad or p.grad is not None for p in clip.weights.module.parameters())


@pytest.mark.parametrize("family", ["SD1", "SD2"])
def test_a_checkpoint_trained_in_full_loads_as_it_was_trained(host, family):
    model, _, _ = host.load_checkpoint(f"{family}.safetensors")
    x, tau = torch.randn(2, 4, 8, 8), torch.tensor([3.5, 998.0])
    context = {"context": torch.randn(2, 77, {"SD1": 768, "SD2": 1024}[family])}
    path = host.folder("checkpoints") / f"{family}_tuned.safetensors"
    with host.training(model) as backbone:
        plain = backbone(x, tau, context).detach()
        with trainable(backbone, PRESETS["full"], seed=0) as full:
            assert torch.equal(backbone(x, tau, context).detach(), plain)
            optimizer = torch.optim.SGD(full.parameters(), lr=1e-2)
            backbone(x, tau, context).square().mean().backward()
            optimizer.step()
            trained = backbone(x, tau, context).detach()
            metadata = {"diff2flow.version": "1", "diff2flow.start": "noise"}
            save_checkpoint(path, backbone.base_path, full.tensors, metadata, torch.float32)
        assert torch.equal(backbone(x, tau, context).detach(), plain)
    assert not torch.allclose(trained, plain, atol=1e-4)
    again, _, _ = host.load_checkpoint(path.name)
    assert host.facts(again).loras[0]["diff2flow.start"] == "noise" and not host.facts(model).loras
    with host.training(again) as backbone:
        assert torch.equal(backbone(x, tau, context).detach(), trained)
