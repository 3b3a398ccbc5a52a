"""Depth without ComfyUI: the templates, noise, polarity, sizes, SDXL, and what is wrong, on tiny random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.hosts.headless import HeadlessHost, core_nodes
from diff2flow_nodes.nodes import (
    Diff2FlowDepth,
    Diff2FlowDepthDataset,
    Diff2FlowImageDataset,
    Diff2FlowLoraConfig,
    Diff2FlowLoraLoader,
    Diff2FlowModel,
    Diff2FlowSampler,
    Diff2FlowTrain,
    Diff2FlowTrainWatch,
)
from diff2flow_nodes.tests.depth_pairs import disc_on_slope, write_bad_pairs, write_pairs
from diff2flow_nodes.tests.headless_fixtures import make_checkpoint

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other

FAMILIES = ("SD1", "SDXL")
XL = {"channels": (32, 64), "attended": (False, True)}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("depth"), list(hosts._chosen)
    made = HeadlessHost(place / "models", place / "input", place / "output")
    make_checkpoint(made.folder("checkpoints") / "SD1.safetensors", vae="means")
    make_checkpoint(made.folder("checkpoints") / "SDXL.safetensors", "SDXL", vae="means", **XL)
    write_pairs(place / "input" / "pairs", 4, (32, 32))
    write_bad_pairs(place / "input" / "bad")
    hosts.use(made)
    yield made
    hosts._chosen[:] = before


def trained(host, family, name, folder="pairs", objective="diff2flow", watch=None, **lora):
    """Diff2Flow Train on depth, a few loud steps: its MODEL."""
    model, clip, vae = host.load_checkpoint(f"{family}.safetensors")
    settings = {"preset": "custom", "rank": 4, "alpha": 4.0, "conv": True, "ends_in_full": True, **lora}
    dataset, _ = Diff2FlowDepthDataset().build(folder, vae, clip, 32)
    config = Diff2FlowLoraConfig().build(**settings)
    config = config["result"][0] if isinstance(config, dict) else config[0]
    return Diff2FlowTrain().train(model, dataset, config, objective, 8, 2, 1e-2, 0, name, watch=watch)["result"][0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def seeing(host, family):
    """MODEL with a depth LoRA from its file, CLIP, VAE."""
    trained(host, family, f"{family}_depth")
    model, clip, vae = host.load_checkpoint(f"{family}.safetensors")
    return Diff2FlowLoraLoader().load(model, f"{family}_depth.safetensors", 1.0)[0], clip, vae


@pytest.fixture(scope="module")
def sd1(host):
    trained(host, "SD1", "sd1_alone")
    model, clip, vae = host.load_checkpoint("SD1.safetensors")
    return Diff2FlowLoraLoader().load(model, "sd1_alone.safetensors", 1.0)[0], clip, vae


def images(*numbers, size=(32, 32)):
    return torch.from_numpy(np.stack([disc_on_slope(number, size)[0] for number in numbers]) / 255).float()


def estimated(seeing, image, steps=2, ensemble=1, resolution=0, seed=0, **changes):
    """Picture, raw depth and uncertainty (B, H, W)."""
    found = Diff2FlowDepth().estimate(*seeing, image, steps, ensemble, resolution, seed, **changes)
    assert all(part.shape == image.shape and part.isfinite().all() for part in found)
    assert all(torch.equal(part[..., :1].expand_as(part), part) for part in found)
    return [part[..., 0] for part in found]


def test_fixed_noise_makes_equal_frames_equal_and_fresh_noise_does_not(seeing):
    frames = images(3, 5, 3)
    _, fixed, _ = estimated(seeing, frames, batch_size=2)
    _, fresh, _ = estimated(seeing, frames, batch_size=2, noise="fresh")
    torch.testing.assert_close(fixed[0], fixed[2], rtol=0, atol=1e-5)
    spread = float(fixed.max() - fixed.min())
    assert (fixed[0] - fixed[1]).abs().max() > 1e-3 * spread  # it looks at the image
    assert (fresh[0] - fresh[2]).abs().max() > 0.01 * spread
    torch.testing.assert_close(fresh[0], fixed[0], rtol=0, atol=1e-5)  # the first frame's noise is the first there is


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_batches_do_not_matter(seeing, noise):
    frames = images(1, 2, 3)
    whole, singly = (estimated(seeing, frames, batch_size=size, noise=noise, ensemble=2) for size in (4, 1))
    for one, other in zip(whole, singly, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_polarity_turns_the_picture_and_leaves_the_raw_depth(seeing):
    white, raw, _ = estimated(seeing, images(4))
    black, same, _ = estimated(seeing, images(4), polarity="near_black")
    assert torch.equal(raw, same) and raw.std() > 0
    torch.testing.assert_close(white, 1.0 - black, rtol=0, atol=1e-6)
    assert white[raw == raw.max()].max() < white[raw == raw.min()].min()


def test_an_ensemble_says_where_it_is_uncertain(seeing):
    one, four = (estimated(seeing, images(2), ensemble=count) for count in (1, 4))
    assert one[2].eq(0).all() and four[2].max() > 0
    assert not torch.equal(one[1], four[1])


def test_resolution_is_the_loras_own_and_any_other_if_told(seeing):
    image = images(6, size=(40, 72))
    automatic, told, larger = (estimated(seeing, image, resolution=size)[1] for size in (0, 32, 72))
    assert torch.equal(automatic, told) and not torch.allclose(automatic, larger, atol=1e-4)


def test_what_training_gives_is_what_its_file_gives(host):
    """The MODEL of Diff2Flow Train and the one with the file's LoRA, which is rounded to half precision."""
    model = trained(host, "SD1", "again")
    plain, clip, vae = host.load_checkpoint("SD1.safetensors")
    loaded, steps, cfg = Diff2FlowLoraLoader().load(plain, "again.safetensors", 1.0)
    assert (steps, cfg) == (10, 1.0) and host.facts(loaded).sees_image and not host.facts(plain).sees_image
    one, other = (estimated((each, clip, vae), images(1))[1] for each in (model, loaded))
    assert (one - other).abs().max() < 0.02 * (one.max() - one.min())
    seeing_nothing, _, _ = Diff2FlowLoraLoader().load(plain, "again.safetensors", 0.0)
    assert not host.facts(seeing_nothing).sees_image


@pytest.mark.parametrize("objective", ["flow_matching", "diffusion"])
def test_other_objectives_estimate_depth_too(host, objective):
    model = trained(host, "SD1", objective, objective=objective)
    _, clip, vae = host.load_checkpoint("SD1.safetensors")
    assert estimated((model, clip, vae), images(1))[1].std() > 0


def test_prompts_make_images_as_before(host, sd1):
    """The checkpoint below a depth LoRA samples what it did, before and after depth was estimated."""
    plain, clip, _ = host.load_checkpoint("SD1.safetensors")
    first, _, _ = Diff2FlowLoraLoader().load(plain, "sd1_alone.safetensors", 1.0)
    before = drawn(plain, clip)
    estimated((first, *sd1[1:]), images(1))
    assert torch.equal(drawn(plain, clip), before)


def drawn(model, clip):
    text = hosts.current().encode_text(clip, "a disc")
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    return Diff2FlowSampler().sample(model, text, text, latent, 1, 2, 3.0, "euler", 1.0, "auto")[0]["samples"]


def ksampled(model, clip, image=None):
    text = hosts.current().encode_text(clip, "")
    if image is not None:
        text = [[context, {**options, "concat_latent_image": image}] for context, options in text]
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    return core_nodes.KSampler().sample(model, 0, 2, 1.0, "euler", "simple", text, text, latent, 1.0)[0]["samples"]


def test_a_ksampler_behind_diff2flow_model_gives_the_same_depth(host, sd1):
    model, clip, vae = sd1
    (flow,) = Diff2FlowModel().patch(model, "auto", "auto", "auto", 1.0)
    image = images(1)
    sampled = host.decode_image(vae, ksampled(flow, clip, host.encode_image(vae, image))).mean(dim=-1)
    torch.testing.assert_close(sampled, estimated(sd1, image)[1], rtol=0, atol=1e-4)


def test_a_depth_lora_makes_no_images_of_prompts(sd1):
    model, clip, _ = sd1
    with pytest.raises(HostError, match="Diff2Flow Sampler: model: the LoRA 'sd1_alone' .* Diff2Flow Depth"):
        drawn(model, clip)
    for each in (model, Diff2FlowModel().patch(model, "auto", "auto", "auto", 1.0)[0]):
        with pytest.raises(HostError, match="the model looks at an image .* use Diff2Flow Depth"):
            ksampled(each, clip)


def test_a_plain_model_tells_no_depth(host, family):
    with pytest.raises(HostError, match="Diff2Flow Depth: model: it does not look at images"):
        estimated(host.load_checkpoint(f"{family}.safetensors"), images(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"ensemble": 0}, "ensemble must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"resolution": 8}, "resolution must be at least 16 pixels, not 8"),
        ({"noise": "loud"}, "noise must be one of fixed, fresh, not 'loud'"),
        ({"solver": "leap"}, "leap"),
        ({"reduction": "mode"}, "mode"),
        ({"polarity": "grey"}, "grey"),
        ({"colours": "pink"}, "pink"),
    ],
)
def test_values_out_of_range_are_named(sd1, changes, message):
    with pytest.raises(HostError, match=f"^Diff2Flow Depth: .*{message}"):
        estimated(sd1, images(1), **changes)


def test_what_is_no_image_is_said(sd1):
    with pytest.raises(HostError, match="Diff2Flow Depth: image: an IMAGE .* is needed, not"):
        Diff2FlowDepth().estimate(*sd1, torch.zeros(1, 8, 8, 4), 1, 1, 0, 0)
    with pytest.raises(HostError, match="Diff2Flow Depth: image: it holds values that are NaN or infinite"):
        Diff2FlowDepth().estimate(*sd1, torch.full((1, 8, 8, 3), float("nan")), 1, 1, 0, 0)


@pytest.mark.parametrize(
    ("folder", "lora", "message"),
    [
        ("bad/rgb", {}, "Diff2Flow Depth Dataset: .*'0.png' is an 8-bit RGB picture, not depth"),
        ("bad/smaller", {}, "Diff2Flow Depth Dataset: .*its depth is 48×32 px, the image 64×64"),
        ("bad/invalid", {}, "Diff2Flow Depth Dataset: .*none of its depth is valid"),
        ("pairs", {"preset": "light"}, "Diff2Flow Train: lora: 'pairs' holds depth, .*preset 'light'.*'paper-small'"),
        ("pairs", {"preset": "full"}, "Diff2Flow Train: lora: 'pairs' holds depth, .*preset 'full'"),
        ("pairs", {"ends_in_full": False}, "Diff2Flow Train: lora: .*preset 'custom' without ends_in_full"),
        ("pairs", {"exclude": "conv_in"}, "Diff2Flow Train: the dataset holds depth, .*exclude"),
    ],
)
def test_what_cannot_be_trained_is_said(host, folder, lora, message):
    with pytest.raises(HostError, match=f"^{message}") as caught:
        trained(host, "SD1", "never", folder, **lora)
    assert "\n" not in str(caught.value)
    assert not list(host.folder("loras").glob("never*"))


def test_prompts_are_no_samples_of_depth(host):
    _, clip, vae = host.load_checkpoint("SD1.safetensors")
    (watch,) = Diff2FlowTrainWatch().build(vae, clip, "a disc", 1, "2", 1.0, 32, 32, 0, validate_every=0)
    with pytest.raises(HostError, match="Diff2Flow Train: watch: .*'pairs' trains"):
        trained(host, "SD1", "never", watch=watch)


def test_a_depth_model_is_trained_further(host, sd1):
    """The second LoRA stands on the first; it widens no more than that."""
    model, clip, vae = sd1
    dataset, _ = Diff2FlowDepthDataset().build("pairs", vae, clip, 32)
    config = Diff2FlowLoraConfig().build("custom", 4, 4.0, ends_in_full=True)[0]
    further = Diff2FlowTrain().train(model, dataset, config, "diff2flow", 4, 2, 1e-2, 0, "second")["result"][0]
    both = Diff2FlowLoraLoader().load(model, "second.safetensors", 1.0)[0]
    assert host.facts(both).in_channels == 8 and len(host.facts(both).loras) == 2
    first, second, loaded = (estimated((each, clip, vae), images(1))[1] for each in (model, further, both))
    spread = float(first.max() - first.min())
    assert (second - first).abs().max() > 0.02 * spread > (second - loaded).abs().max()


def test_a_depth_model_is_not_trained_on_images(host, sd1):
    model, clip, vae = sd1
    dataset, _ = Diff2FlowImageDataset().build("pairs/images", vae, clip, 32, default_caption="a disc")
    with pytest.raises(HostError, match="^Diff2Flow Train: model: its network takes 8 input channels"):
        light = Diff2FlowLoraConfig().build("light", 16, 16.0)[0]
        Diff2FlowTrain().train(model, dataset, light, "diff2flow", 1, 1, 1e-3, 0, "never")
