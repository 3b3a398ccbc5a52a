"""The picture prior: what is held out, what is stored, and that the checkpoint computes what was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diff2flow_nodes.bench import subjects, tiny_taesd  # noqa: E402
from diff2flow_nodes.bench.picture_prior import (  # noqa: E402
    autoencoder,
    captions,
    checkpoint,
    data,
    latents,
    moving,
    sampling,
    stored,
    training,
    words,
)
from diff2flow_nodes.bench.picture_prior.network import Network  # noqa: E402
from diff2flow_nodes.hosts.headless.autoencoder import read_autoencoder  # noqa: E402
from diff2flow_nodes.hosts.headless.unet_layout import PREFIX, UnetLayout  # noqa: E402

STYLES = tuple(data.STYLES)
CODES = [f"{0x1F300 + i:x}" for i in range(900)]
CPU = torch.device("cpu")


def picture(place: int) -> data.Picture:
    """One of three objects in three styles."""
    name = ("red heart", "owl", "rocket")[place // 3]
    return data.Picture(STYLES[place % 3], CODES[place // 3], name, ("love",), "symbols", place % 2 == 0, False)


@pytest.fixture(scope="module")
def pictures() -> data.Pictures:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    return data.Pictures(pixels, [picture(place) for place in range(9)])


@pytest.fixture(scope="module")
def prior(pictures: data.Pictures) -> stored.Prior:
    """Not trained, but with positions that differ."""
    network = Network(captions.Captions(pictures.about).tokens())
    with torch.no_grad():
        network.words.positions.mul_(10.0)
    module = autoencoder.autoencoder(autoencoder.WIDTH)
    return stored.Prior(network.requires_grad_(False).eval(), module, 0.1, 0.8, {"step": 7, "seconds": 60})


@pytest.fixture(scope="module")
def state(prior: stored.Prior) -> dict[str, torch.Tensor]:
    return checkpoint.state(prior)


@pytest.fixture(scope="module")
def encoder(state: dict[str, torch.Tensor]):
    """CLIP-L, read from the checkpoint with transformers."""
    prefix = "cond_stage_model."
    text = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return subjects.text_encoder(text)


def test_a_tenth_is_held_out_always_the_same_and_never_all_of_an_object():
    held = [[data.held_out(code, style, STYLES) for style in STYLES] for code in CODES]
    assert held == [[data.held_out(code, style, STYLES) for style in STYLES] for code in CODES]
    assert max(map(sum, held)) == 1
    assert 0.08 < sum(map(sum, held)) / (3 * len(held)) < 0.12
    assert [code for code, row in zip(CODES[:12], held, strict=False) if row[0]] == ["1f307", "1f30b"]
    assert not any(data.held_out(code, "noto", ("noto",)) for code in CODES)


def test_learned_and_held_out_pictures_are_all_there_are(pictures):
    one, other = pictures.chosen(lambda p: p.held_out), pictures.chosen(lambda p: not p.held_out)
    assert len(one.about) + len(other.about) == len(pictures.about)
    assert not {(p.hexcode, p.style) for p in one.about} & {(p.hexcode, p.style) for p in other.about}


def test_no_motion_leaves_pictures_as_they_are(pictures):
    still = moving.Motion(turn=0.0, smallest=1.0 - 1e-6, largest=1.0, shift=0.0, mirror=0.0)
    pixels = torch.from_numpy(pictures.pixels)
    made = moving.moved(pixels, torch.ones(9, dtype=torch.bool), still, torch.Generator().manual_seed(0))
    assert torch.allclose(made.movedim(1, -1), pictures.images(), atol=1e-3)
    mirroring = moving.Motion(turn=0.0, smallest=1.0 - 1e-6, largest=1.0, shift=0.0, mirror=1.1)
    mirrored = moving.moved(pixels, torch.ones(9, dtype=torch.bool), mirroring, torch.Generator().manual_seed(0))
    assert torch.allclose(mirrored.movedim(1, -1), pictures.images().flip(2), atol=1e-3)


def test_captions_are_drawn_in_all_wordings_and_have_rows(pictures):
    drawing, random = captions.Captions(pictures.about), torch.Generator().manual_seed(0)
    drawn = {drawing.drawn(0, random) for _ in range(100)}
    assert {"noto style, red heart", "red heart", "noto style, love", "noto style, red heart, love"} == drawn
    known = set(drawing.tokens())
    assert all(set(captions.token_ids(text)) <= known for text in drawn)


def test_the_autoencoder_is_as_wide_as_the_file_wants_and_computes_the_same(prior, state):
    vae = read_autoencoder(state, "prior", CPU)
    images = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    z = tiny_taesd.encode(prior.autoencoder, images)
    latent = vae.encode(images)
    assert torch.allclose(tiny_taesd.LATENT_SCALE * latent, (z - prior.mean) / prior.std, atol=1e-4)
    assert torch.allclose(vae.decode(latent), tiny_taesd.decode(prior.autoencoder, z), atol=1e-4)


@pytest.mark.parametrize("text", ["fluent style, red heart, owl", "an unknown zeppelin", ""])
def test_clip_computes_what_the_rows_say(prior, encoder, text):
    wide = encoder.encode(text)[0][0][0]
    narrow = prior.network.words(captions.padded([text], words.LENGTH))[0]
    assert torch.allclose(wide[: words.LENGTH], narrow @ words.projection(), atol=5e-3)
    assert torch.allclose(wide[words.LENGTH :], wide[words.LENGTH - 1].expand(77 - words.LENGTH, -1), atol=1e-5)
    assert words.repeats().sum() == 77


def test_the_wide_network_computes_what_the_narrow_one_does(prior, state, encoder):
    from diffusers import UNet2DConditionModel

    weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    layout = UnetLayout(weights, "prior")
    assert layout.family == "SD1" and weights["input_blocks.0.0.weight"].shape[0] == 320
    with torch.device("meta"):
        wide = UNet2DConditionModel(**layout.config)
    named = {layout.to_diffusers(key): value.float() for key, value in weights.items()}
    wide.load_state_dict(named, assign=True)
    text = "noto style, rocket"
    x, tau = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(400)
    with torch.no_grad():
        expected = prior.network(x, tau, prior.network.words(captions.padded([text], words.LENGTH)))[0]
        made = wide(x, tau, encoder.encode(text)[0][0], return_dict=False)[0]
    assert torch.allclose(made, expected, atol=5e-3 * float(expected.std()))


def test_captions_are_heard_from_the_start(prior):
    x, tau = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(900)
    texts = ["noto style, rocket", "fluent style, owl"]
    one, other = (prior.network(x, tau, prior.network.words(captions.padded([t], words.LENGTH)))[0] for t in texts)
    assert (one - other).std() > 0.1 * one.std()


def test_what_is_stored_comes_back_and_is_small(prior, tmp_path):
    stored.write(tmp_path / "prior.safetensors", prior)
    back = stored.read(tmp_path / "prior.safetensors")
    assert (back.mean, back.std, back.provenance) == (prior.mean, prior.std, prior.provenance)
    for one, other in zip(prior.network.parameters(), back.network.parameters(), strict=True):
        assert torch.equal(one.half().float(), other)
    tokens = captions.Captions([picture(0)]).tokens()
    full = stored.Prior(Network(range(4000 + len(tokens))), prior.autoencoder, 0.0, 1.0, {})
    stored.write(tmp_path / "full.safetensors", full)
    assert (tmp_path / "full.safetensors").stat().st_size <= stored.LARGEST


@pytest.mark.skipif(not stored.COMMITTED.is_file(), reason="no prior is stored yet")
def test_the_stored_prior_draws_and_says_where_it_comes_from():
    assert stored.COMMITTED.stat().st_size <= stored.LARGEST
    prior = stored.read(stored.COMMITTED)
    assert {"step", "pictures", "seconds", "command", "commit", "packages"} <= set(prior.provenance)
    made = sampling.grid(prior, sampling.PROMPTS[:1], 0, 2, 2, 3.0)
    assert made.shape == (128, 256, 3) and made.std() > 0.02


@pytest.fixture
def packed(pictures: data.Pictures, tmp_path, monkeypatch):
    """Nine pictures' latents of noise, and their captions, in one file."""
    z = torch.randn(2, 9, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    monkeypatch.setattr(data, "load", lambda work: pictures)
    monkeypatch.setattr(data, "versions", lambda: {"a package": "1.0"})
    monkeypatch.setattr(latents, "encode", lambda *_, **__: latents.Latents(z, 0.25, 1.5))
    training.pack(tmp_path, tmp_path / "packed.safetensors")
    return tmp_path / "packed.safetensors", (z.float() - 0.25) / 1.5


def test_what_is_learned_from_travels_as_one_file(packed):
    path, x_data = packed
    learned = training.unpacked(path)
    assert (learned.x_data - x_data).abs().max() <= 0.51 * x_data.abs().max() / 127 * 1.1
    texts = {tuple(ids) for row in learned.ids.tolist() for ids in row}
    assert tuple(captions.padded(["noto style, red heart"], words.LENGTH)[0].tolist()) in texts
    assert learned.about["packages"] == {"a package": "1.0"}


def test_training_learns_and_goes_on_from_what_is_stored(packed, prior, tmp_path, monkeypatch):
    """The network learns nine pictures of noise; the loss falls to a half of where it begins."""
    monkeypatch.setattr(stored, "COMMITTED", tmp_path / "committed.safetensors")
    stored.write(stored.COMMITTED, prior)
    learned = training.unpacked(packed[0])
    running = training.Training(learned, training.Plan(3600.0, batch=8, rate=2e-3, warm_up=5), CPU)
    first = [float(running.one()) for _ in range(3)]
    last = [float(running.one()) for _ in range(40)][-3:]
    assert sum(last) < 0.5 * sum(first)
    training.train(packed[0], tmp_path, training.Plan(0.01, batch=2), "a command", CPU)
    one = stored.read(stored.path_in(tmp_path))
    training.train(packed[0], tmp_path, training.Plan(0.01, batch=2, rate=0.0), "again", CPU, further=True)
    other = stored.read(stored.path_in(tmp_path))
    assert one.provenance["step"] >= 1 and other.provenance["after"]["command"] == "a command"
    for before, after in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(before, after)


def test_words_are_looked_up_as_a_matrix_product(prior):
    ids = captions.padded(["fluent style, red heart", ""], words.LENGTH)
    places = prior.network.words.places(ids)
    assert torch.allclose(prior.network.words.of_places(places), prior.network.words(ids), atol=1e-6)


def test_the_rate_rises_stays_and_falls():
    plan = training.Plan(seconds=100.0, rate=1.0, warm_up=10, falling=0.2)
    assert [plan.rate_at(0, 0.0), plan.rate_at(50, 50.0), plan.rate_at(99, 90.0)] == pytest.approx([0.1, 1.0, 0.5])
    assert plan.rate_at(99, 101.0) == 0.0


def test_long_captions_lose_keywords_and_keep_their_name():
    words_of_it = ("ideograph " * 6,) * 3
    long = data.Picture("noto", "1f000", "japanese not free of charge button", words_of_it, "symbols", True, False)
    drawing, random = captions.Captions([long, replace(long, hexcode="1f001")]), torch.Generator().manual_seed(0)
    drawn = {drawing.drawn(0, random) for _ in range(60)}
    captions.padded(list(drawn), words.LENGTH)
    assert "noto style, japanese not free of charge button" in drawn
