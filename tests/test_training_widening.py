"""The first layer widened to see an image: at first the network is what it was; its file widens a plain weight."""

from dataclasses import replace

import pytest
import torch

from diff2flow_nodes.tests.training_fakes import FILE_NAMES, TinyBackbone, tiny_dataset, tiny_job
from diff2flow_nodes.training.adapters import trainable
from diff2flow_nodes.training.conditioning import beside_image, conditioned
from diff2flow_nodes.training.finetune import finetune
from diff2flow_nodes.training.layers import GROUPS, LoraSettings, choose_layers
from diff2flow_nodes.training.lora_file import load_lora
from diff2flow_nodes.training.lora_kinds import changes
from diff2flow_nodes.training.recipes import RECIPES

DEPTH = LoraSettings(groups=GROUPS, rank=4, alpha=2.0, ends_in_full=True)
FIRST = "lora_unet_conv_in"


class SeeingBackbone(TinyBackbone):
    """One that puts the image behind x_diff, as both hosts do."""

    def __call__(self, x_diff, tau, conditioning):
        return super().__call__(beside_image(x_diff, conditioning.get("image")), tau, conditioning)


def _inputs(seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, image, context = (torch.randn(2, *shape, generator=draw) for shape in ((4, 4, 4), (4, 4, 4), (3, 6)))
    return x, image, context, torch.tensor([10.5, 900.0])


def _seeing(folder, count=3):
    """A dataset whose items have an image."""
    dataset = tiny_dataset(folder, count)
    draw = torch.Generator().manual_seed(8)
    for i in range(count):
        dataset.latents.add({f"seen{i}": torch.randn(1, 4, 4, 4, generator=draw)})
    dataset.latents.flush()
    return replace(dataset, items=tuple(replace(item, image=f"seen{i}") for i, item in enumerate(dataset.items)))


@pytest.mark.parametrize("widening", ["zeros", "halved"])
def test_the_widened_network_begins_as_the_old_one(widening):
    """zeros: whatever the image; halved: where the image is the noisy latent."""
    backbone = SeeingBackbone()
    x, image, context, tau = _inputs()
    before = backbone(x, tau, {"context": context})
    seen = x if widening == "halved" else image
    with trainable(backbone, replace(DEPTH, widening=widening), 0, inputs=8):
        after = backbone(x, tau, {"context": context, "image": seen})
        other = backbone(x, tau, {"context": context, "image": image + 1})
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(other, before) == (widening == "zeros")
    assert torch.equal(backbone(x, tau, {"context": context}), before)


def test_halved_is_half_of_each():
    backbone = SeeingBackbone()
    weight = backbone.module.first.weight
    with trainable(backbone, replace(DEPTH, widening="halved"), 0, inputs=8):
        change = backbone.module.first.weight_change
        assert torch.equal(weight + change[:, :4], weight / 2) and torch.equal(change[:, 4:], weight / 2)


@pytest.mark.parametrize("widening", ["zeros", "halved"])
def test_the_file_widens_a_plain_weight_to_the_trained_one(widening):
    backbone = SeeingBackbone()
    weight = backbone.module.first.weight.detach().clone()
    x, image, context, tau = _inputs(1)
    with trainable(backbone, replace(DEPTH, widening=widening), 0, inputs=8) as adapters:
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        first = backbone.module.first
        trained = first(torch.cat([x, image], dim=1))
        state = adapters.state()
        size = next(layer.size for layer in adapters.layers if layer.file_name == "conv_in")
    assert size == 16 * 8 * 9 + 16
    assert state[f"{FIRST}.reshape_weight"].tolist() == [16, 8, 3, 3] and f"{FIRST}.diff" not in state
    assert state[f"{FIRST}.alpha"] == len(state[f"{FIRST}.lora_down.weight"])
    parts = {name.removeprefix(f"{FIRST}."): tensor for name, tensor in state.items() if name.startswith(FIRST)}
    merged = changes(parts)["weight"].apply(weight, 1.0)
    bias = backbone.module.first.bias + state[f"{FIRST}.diff_b"]
    again = torch.nn.functional.conv2d(torch.cat([x, image], dim=1), merged, bias, padding=1)
    torch.testing.assert_close(again, trained, rtol=1e-5, atol=1e-5)


def test_training_looks_at_the_image_and_leaves_the_network_as_it_was(tmp_path):
    backbone, dataset = SeeingBackbone(), _seeing(tmp_path / "data")
    weights = {name: p.clone() for name, p in backbone.module.named_parameters()}
    job = tiny_job(tmp_path, backbone, DEPTH, dataset, steps=8)
    done = finetune(job, _Silent())
    assert done.metadata["diff2flow.task"] == "depth"
    state, _ = load_lora(tmp_path / "loras" / "style.safetensors")
    up, down = state[f"{FIRST}.lora_up.weight"], state[f"{FIRST}.lora_down.weight"]
    change = (up.flatten(1) @ down.flatten(1)).reshape(16, 8, 3, 3)
    assert change[:, 4:].abs().max() > 1e-4 and change[:, :4].abs().max() > 1e-4
    assert {name: torch.equal(p, weights[name]) for name, p in backbone.module.named_parameters()} == dict.fromkeys(
        weights, True
    )
    given = conditioned(backbone, dataset.batch([0, 2]))
    expected = torch.cat([dataset.latents.get("seen0"), dataset.latents.get("seen2")])
    torch.testing.assert_close(given["image"], expected * 0.5)  # in the network's scale


class _Silent:
    def update(self, *_):
        pass

    event = close = command = update


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraSettings(rank=4, alpha=4.0), "preset 'custom' without ends_in_full does not do that: choose preset"),
        (LoraSettings(preset="full", groups=(), full=True), "preset 'full' does not do that"),
        (replace(DEPTH, exclude=("conv_in",)), "out of exclude"),
    ],
)
def test_depth_needs_the_first_layer(tmp_path, lora, words):
    job = tiny_job(tmp_path, SeeingBackbone(), lora, _seeing(tmp_path / "data"))
    with pytest.raises(ValueError, match=words):
        finetune(job, _Silent())


def test_windows_ask_a_network_that_knows_no_depth(tmp_path):
    objective = RECIPES["windows"]
    job = tiny_job(tmp_path, SeeingBackbone(), DEPTH, _seeing(tmp_path / "data"), objective=objective)
    with pytest.raises(ValueError, match="knows nothing of depth"):
        finetune(job, _Silent())


def test_a_layer_cannot_be_widened_to_anything():
    network = TinyBackbone().module
    for settings, inputs in ((DEPTH, 3), (replace(DEPTH, widening="halved"), 7)):
        [first] = [layer for layer in choose_layers(network, FILE_NAMES, settings, inputs) if layer.inputs]
        assert first.inputs == inputs
        with pytest.raises(ValueError, match=f"cannot be widened to {inputs}"):
            trainable(SeeingBackbone(), settings, 0, inputs=inputs).__enter__()
    with pytest.raises(ValueError, match="widening must be one of zeros, halved"):
        replace(DEPTH, widening="doubled")


def test_depth_and_images_are_not_joined(tmp_path):
    with pytest.raises(ValueError, match="one holds depth and the other does not"):
        _seeing(tmp_path / "a").joined(tiny_dataset(tmp_path / "b"))


def test_image_and_noise_are_joined_in_half_precision_under_autocast():
    """A GPU with bf16 and a checkpoint in fp16: autocast itself refuses to join two fp16 tensors."""
    half = torch.ones(1, 4, 2, 2, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both = beside_image(half, 2 * half)
    assert both.dtype == torch.float16 and torch.equal(both, torch.cat([half, 2 * half], dim=1))
