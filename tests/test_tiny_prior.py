"""The tiny prior: its file's layout, its digits, its classifier, and a training that goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diff2flow_nodes.bench import (
    classifier,
    digits,
    ldm_layout,
    scene_plan,
    scene_prior,
    scenes,
    text_weights,
    tiny_prior,
    tiny_taesd,
    tiny_unet,
)
from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.bench.short_training import Plan, ShortTraining
from diff2flow_nodes.bench.widen import narrowed, widened, widened_lora

torch.set_num_threads(1)  # tiny networks: on a busy machine more threads only wait for each other


@pytest.mark.parametrize(("levels", "blocks", "family"), [(1, 1, "SD1"), (2, 2, "SD1"), (3, 1, "SD2"), (3, 2, "SDXL")])
def test_unet_names_come_back_as_diffusers_reads_them(levels: int, blocks: int, family: str) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = tiny_unet.unet_config(levels, blocks, family, width=64)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    state = {name: torch.tensor([float(i)]) for i, name in enumerate(unet.state_dict())}
    named = {ldm_layout.UNET_PREFIX + name: value for name, value in ldm_layout.unet_to_ldm(state, blocks).items()}
    assert convert_ldm_unet_checkpoint(dict(named), unet.config) == state


def test_a_foreign_key_is_named() -> None:
    with pytest.raises(ValueError, match="joint_blocks"):
        ldm_layout.unet_to_ldm({"joint_blocks.0.weight": torch.zeros(1)}, 1)


@pytest.mark.parametrize("copies", [2, 5, 10])
def test_a_widened_unet_computes_the_same(copies: int) -> None:
    narrow = tiny_unet.trainable_unet(320 // copies, seed=1).eval()
    wide = tiny_unet.random_unet(tiny_unet.unet_config(), seed=0).eval()
    wide.load_state_dict(widened(narrow.state_dict(), wide.state_dict(), copies, seed=0))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3.5, 900.0]), torch.randn(2, 77, 768)
    with torch.no_grad():
        assert torch.allclose(narrow(*inputs).sample, wide(*inputs).sample, atol=1e-5)


def test_a_wide_unet_becomes_the_narrow_one_again() -> None:
    narrow = tiny_unet.trainable_unet(64, seed=1).state_dict()
    wide = tiny_unet.random_unet(tiny_unet.unet_config(), seed=0).state_dict()
    again = narrowed(widened(narrow, wide, 5, seed=0), narrow, 5)
    assert all(torch.allclose(value, narrow[name], atol=1e-6) for name, value in again.items())
    assert list(again) == list(narrow)
    layout = {name: ldm_layout.unet_to_ldm(state, 1) for name, state in (("wide", wide), ("narrow", narrow))}
    assert set(narrowed(layout["wide"], layout["narrow"], 5)) == set(layout["narrow"])
    with pytest.raises(ValueError, match="with 2 copies"):
        narrowed(wide, narrow, 2)


def test_a_widened_lora_does_to_the_wide_unet_what_it_did_to_the_narrow_one() -> None:
    narrow = tiny_unet.trainable_unet(64, seed=1).eval()
    wide = tiny_unet.random_unet(tiny_unet.unet_config(), seed=0).eval()
    shapes = narrow.state_dict(), wide.state_dict()
    wide.load_state_dict(widened(shapes[0], shapes[1], 5, seed=0))
    random = torch.Generator().manual_seed(0)
    lora, chosen = {}, [name for name in shapes[0] if name.endswith(("to_q.weight", "conv1.weight", "ff.net.2.weight"))]
    for name in chosen:
        weight, key = shapes[0][name], f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        lora[f"{key}.lora_down.weight"] = torch.randn(4, *weight.shape[1:], generator=random) * 0.1
        lora[f"{key}.lora_up.weight"] = torch.randn(len(weight), 4, *[1] * (weight.ndim - 2), generator=random) * 0.1
        lora[f"{key}.alpha"] = torch.tensor(4.0)
    for name in ("conv_in", "conv_out"):
        lora[f"lora_unet_{name}.diff"] = torch.randn(shapes[0][f"{name}.weight"].shape, generator=random) * 0.1
        lora[f"lora_unet_{name}.diff_b"] = torch.randn(shapes[0][f"{name}.bias"].shape, generator=random) * 0.1
    _merge(narrow, lora, chosen)
    _merge(wide, widened_lora(lora, *shapes, 5), chosen)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3.5, 900.0]), torch.randn(2, 77, 768)
    with torch.no_grad():
        torch.testing.assert_close(wide(*inputs).sample, narrow(*inputs).sample, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="lora_te_x"):
        widened_lora({"lora_te_x.alpha": torch.tensor(1.0)}, *shapes, 5)


def _merge(unet: torch.nn.Module, lora: dict[str, torch.Tensor], chosen: list[str]) -> None:
    state = unet.state_dict()
    for name in chosen:
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        state[name] += torch.tensordot(
            lora[f"{key}.lora_up.weight"].flatten(1), lora[f"{key}.lora_down.weight"], dims=1
        )
    for name in ("conv_in", "conv_out"):
        state[f"{name}.weight"] += lora[f"lora_unet_{name}.diff"]
        state[f"{name}.bias"] += lora[f"lora_unet_{name}.diff_b"]
    unet.load_state_dict(state)


def test_a_wrong_number_of_copies_is_refused() -> None:
    narrow = tiny_unet.trainable_unet(160, seed=1).state_dict()
    wide = tiny_unet.random_unet(tiny_unet.unet_config(), seed=0).state_dict()
    with pytest.raises(ValueError, match="with 5 copies"):
        widened(narrow, wide, 5, seed=0)


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("prior") / "random.safetensors", text_layers=1)


def test_the_random_file_has_every_part(random_file: Path) -> None:
    state = load_file(str(random_file))
    assert state["model.diffusion_model.input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert state["model.diffusion_model.input_blocks.1.1.proj_in.weight"].ndim == 4
    assert state["model.diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape == (320, 768)
    assert state["first_stage_model.taesd_decoder.1.weight"].shape == (64, 4, 3, 3)
    assert state["first_stage_model.vae_scale"].shape == ()
    token = state["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    assert token.shape == (49408, 768) and token.dtype == torch.float16
    assert "v_pred" not in state


def test_the_random_file_is_seeded_and_loads(random_file: Path, tmp_path: Path) -> None:
    from diff2flow_nodes.hosts.headless.host import HeadlessHost

    folder = tmp_path / "checkpoints"
    build_random(folder / "again.safetensors", text_layers=1)
    first, second = load_file(str(random_file)), load_file(str(folder / "again.safetensors"))
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    assert all(torch.equal(first[key], second[key]) for key in (name, "first_stage_model.taesd_encoder.0.weight"))
    model, clip, vae = HeadlessHost(tmp_path, tmp_path, tmp_path).load_checkpoint("again.safetensors")
    assert model.facts.family == "SD1" and model.facts.prediction == "eps"
    picture = digits.render(digits.load()[0][:1], digits.STYLES["golden"])
    assert (vae.decode(vae.encode(picture)) - picture).abs().mean() < 0.1


def test_variants_of_the_random_file(tmp_path: Path) -> None:
    state = load_file(str(build_random(tmp_path / "v.safetensors", 2, 1, "SD2", "v", in_channels=9, text_layers=1)))
    assert "v_pred" in state and state["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 9
    assert state["model.diffusion_model.input_blocks.1.1.proj_in.weight"].ndim == 2
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in state
    with pytest.raises(ValueError, match="'x0'"):
        build_random(tmp_path / "x.safetensors", prediction="x0")
    with pytest.raises(ValueError, match="levels"):
        build_random(tmp_path / "x.safetensors", levels=5)


def test_captions_differ_in_every_token() -> None:
    captions = tiny_prior.Captions(text_weights.clip_l(0, layers=4), digits.CAPTIONS[:2])
    both = captions.usual[[3, 5]]
    assert (both[0] - both[1])[4:].std(dim=1).min() > 0.1
    drawn = captions.drawn(torch.full((200,), 3), torch.Generator().manual_seed(0))
    empty = (drawn == captions.empty).all(dim=(1, 2)).float().mean()
    assert 0.03 < empty < 0.2 and (drawn == captions.usual[3]).all(dim=(1, 2)).any()


def test_pictures_and_captions_on_disk(tmp_path: Path) -> None:
    from PIL import Image

    paths = digits.write(tmp_path, "golden", count=12)
    assert len(paths) == 12 == len(list(tmp_path.glob("*.txt")))
    image = Image.open(paths[3])
    assert image.size == (64, 64) and image.mode == "RGB" and image.getpixel((1, 1))[2] > image.getpixel((1, 1))[0]
    assert paths[3].with_suffix(".txt").read_text() == "a handwritten three\n"
    worded = digits.write(tmp_path / "worded", "golden", count=4, style_word=True)
    assert worded[3].with_suffix(".txt").read_text() == "a golden handwritten three\n"
    with pytest.raises(ValueError, match="'neon'"):
        digits.write(tmp_path, "neon", 1)
    with pytest.raises(ValueError, match="not 0"):
        digits.write(tmp_path, "plain", 0)


def test_the_held_out_digits_are_apart() -> None:
    trained, held_out = digits.split(held_out=False), digits.split(held_out=True)
    assert len(trained[1]) + len(held_out[1]) == 1797 and len(held_out[1]) == 355
    assert torch.bincount(held_out[1]).min() >= 34
    assert not any((trained[0] == image).all(dim=(1, 2)).any() for image in held_out[0][:20])


def test_the_classifier_reads_unseen_digits_in_any_style() -> None:
    images, labels = digits.split(held_out=True)
    for name, least in (("plain", 0.97), ("golden", 0.94), ("ink", 0.94)):
        read = classifier.classify(digits.render(images, digits.STYLES[name]))
        assert (read == labels).float().mean() >= least, name
    assert classifier.features(digits.render(images[:3], digits.STYLES["plain"])).shape == (3, classifier.FEATURES)


def test_the_file_scale_gives_unit_latents() -> None:
    images, _ = digits.split(held_out=True)
    z = tiny_taesd.encode(tiny_taesd.block_mean_autoencoder(0), digits.render(images[:64], digits.STYLES["plain"]))
    scale, shift = tiny_taesd.file_scale(z)
    x_data = tiny_taesd.LATENT_SCALE * (z / scale + shift)
    assert abs(float(x_data.mean())) < 1e-4 and abs(float(x_data.std()) - 1) < 1e-4


def _trainee(folder: Path, steps: int = 6, key: str = "k") -> tuple[ShortTraining, torch.nn.Linear]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    return ShortTraining(layer, Plan(steps, 1e-2, warm_up=2), folder / "state.safetensors", key, "test"), layer


def _loss(layer: torch.nn.Linear):
    return lambda random: (layer(torch.randn(4, 3, generator=random)) - 1.0).square().mean()


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, layer = _trainee(tmp_path / "whole")
    whole.run(_loss(layer))
    halved, other = _trainee(tmp_path / "halved")
    halved.run(_loss(other), until=3)
    resumed, other = _trainee(tmp_path / "halved")
    assert resumed.step == 3
    resumed.run(_loss(other))
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(resumed.averaged().weight, whole.averaged().weight)


def test_a_state_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    first, layer = _trainee(tmp_path)
    first.run(_loss(layer), until=3)
    assert _trainee(tmp_path, key="other")[0].step == 0


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    training, layer = _trainee(tmp_path)
    training.run(_loss(layer), until=2)
    with pytest.raises(ValueError, match="step 2 is nan"):
        training.run(lambda random: layer.weight.sum() * float("nan"))
    assert _trainee(tmp_path)[0].step == 2


def test_a_prior_is_built_once_and_its_work_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits.split(held_out=False)
    monkeypatch.setattr(digits, "split", lambda held_out: (images[:20], labels[:20]))
    quality = tiny_prior.Quality(
        "test",
        Plan(2, 1e-3),
        Plan(2, 1e-3),
        autoencoder_batch=3,
        unet_batch=2,
        copies=10,
        accuracy=1.1,
        judged=2,
        rounds=2,
    )
    monkeypatch.setattr(tiny_prior, "accuracy_of", lambda *a: 0.5)
    shallow = text_weights.clip_l(0, layers=1)
    monkeypatch.setattr(text_weights, "clip_l", lambda seed: shallow)
    path = tiny_prior.build(quality, tmp_path)
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["diff2flow.accuracy_50_steps"] == "0.5000"
    assert not (tmp_path / "tiny_prior_work" / "test").exists()
    written = path.stat().st_mtime_ns
    assert tiny_prior.build(quality, tmp_path).stat().st_mtime_ns == written
    assert not tiny_prior.is_finished(path, replace(quality, seed=1))


def test_the_keys_of_the_priors_of_digits_stay() -> None:
    """Another key would have everyone train them again."""
    keys = {name: tiny_prior.QUALITIES[name].key for name in ("demo", "bench")}
    assert keys == {"demo": "1dbf8017afe04689", "bench": "298484e138cd8c6e"}


def test_a_prior_of_scenes_is_built_of_its_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = text_weights.clip_l(0, layers=1)
    monkeypatch.setattr(text_weights, "clip_l", lambda seed: shallow)
    monkeypatch.setattr(scene_prior, "_MEASURED", 4)
    one = Plan(1, 1e-3)
    quality = tiny_prior.SceneQuality(
        "test", one, one, autoencoder_batch=3, unet_batch=2, copies=10, scenes=8, captions=9
    )
    monkeypatch.setitem(tiny_prior.QUALITIES, "test", quality)
    with safe_open(str(tiny_prior.ensure_narrow("test", tmp_path)), framework="pt") as file:
        metadata = file.metadata()
    assert 0 < float(metadata["diff2flow.autoencoder.depth_absrel"]) < 0.3
    assert float(metadata["diff2flow.autoencoder.picture_error"]) < 0.2
    with pytest.raises(ValueError, match="0.5"):
        replace(quality, accuracy=0.5)


def test_scenes_are_kept_and_called_by_what_is_in_them(tmp_path: Path) -> None:
    subject = scene_prior.SceneSubject(40, 35, tmp_path, "k")
    texts, labels = subject._named()
    assert len(texts) == len(set(texts)) <= 35 and torch.equal(labels, subject.labels)
    plans = [scene_plan.plan(i, scene_prior.TRAINED_SEED) for i in range(40)]
    called = [texts[i] for i in labels.tolist()]
    assert all(text in (p.caption, p.solids[0].name) for text, p in zip(called, plans, strict=True))
    assert any(text == p.caption != p.solids[0].name for text, p in zip(called, plans, strict=True))
    pictures = torch.cat(list(subject.pictures()))
    assert pictures.shape == (40, 64, 64, 3)
    shown, plain = subject.shown(6, torch.Generator().manual_seed(0))
    assert plain == 4 and shown.shape == (6, 64, 64, 3) and (shown[4:] == shown[4:, ..., :1]).all()
    written = (tmp_path / "scenes.safetensors").stat().st_mtime_ns
    again = scene_prior.SceneSubject(40, 35, tmp_path, "k")
    assert torch.equal(torch.cat(list(again.pictures())), pictures)
    assert (tmp_path / "scenes.safetensors").stat().st_mtime_ns == written


def test_depth_as_pictures_and_back() -> None:
    depth = scenes.scenes([0, 1], seed=0).depth
    drawn = scene_prior.depth_pictures(depth)
    assert drawn.shape == (2, 64, 64, 3) and drawn.min() == 0 and drawn.max() == 1
    assert scene_prior.abs_rel(drawn[..., 0], depth) < 0.01
    assert scene_prior.abs_rel(3 * depth.log() - 1, depth) < 1e-5
    assert scene_prior.abs_rel(torch.ones_like(depth), depth) > 0.1
