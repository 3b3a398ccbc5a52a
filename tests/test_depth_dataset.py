"""Folders of images with depth: what is encoded, what counts, what is left out and why."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diff2flow_nodes.training.buckets import Sizes
from diff2flow_nodes.training.depth_folder import DepthSettings, depth_dataset
from diff2flow_nodes.training.encoding import Encoders

SQUARE = DepthSettings(Sizes(32))


class _Encoder:
    """8×8 block means, in four channels; counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return nn.functional.avg_pool2d(image.movedim(-1, 1), 8)[:, [0, 1, 2, 0]]


def _write(folder, name, picture, depth):
    for part in ("images", "depth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / "images" / f"{name}.png")
    np.save(folder / "depth" / f"{name}.npy", depth)


def _picture(width=32, height=32):
    return np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)


def _slope(width=32, height=32):
    return np.linspace(1.0, 9.0, width, dtype=np.float32)[None].repeat(height, 0)


def _made(folder, settings=SQUARE, encoder=None):
    encoder = encoder or _Encoder()
    encoders = Encoders(encoder, lambda caption: (torch.ones(1, 3, 6), None), "vae", "clip")
    return depth_dataset(folder / "set", folder / "cache", settings, encoders, lambda total: _Silent())


class _Silent:
    def update(self, *_):
        pass

    close = update


def test_depth_is_the_latent_and_the_image_is_looked_at(tmp_path):
    picture, depth = _picture(), _slope()
    _write(tmp_path / "set", "a", picture, depth)
    dataset = _made(tmp_path)
    batch = dataset.batch([0])
    log = np.log(depth)
    low, high = np.quantile(log, [0.01, 0.99])
    expected = ((log - low) / (high - low)).clip(0, 1).reshape(4, 8, 4, 8).mean((1, 3))
    np.testing.assert_allclose(batch.latent[0, 0].numpy(), expected, atol=1e-5)
    seen = (picture / 255).reshape(4, 8, 4, 8, 3).mean((1, 3))
    np.testing.assert_allclose(batch.image[0, :3].numpy(), seen.transpose(2, 0, 1), atol=1e-5)
    assert batch.captions == ("",) and batch.mask.eq(1).all() and dataset.image_channels == 4
    assert "1 images with their depth of 32×32 px" in dataset.summary()


def test_what_is_not_valid_does_not_count(tmp_path):
    depth = _slope()
    depth[:9, 20:] = np.nan
    _write(tmp_path / "set", "a", _picture(), depth)
    mask = _made(tmp_path).batch([0]).mask[0, 0]
    expected = torch.ones(4, 4)
    expected[:2, 2:] = 0  # a latent counts only where all of its pixels are valid
    assert torch.equal(mask, expected)
    limited = _made(tmp_path, DepthSettings(Sizes(32), limit=5.0)).batch([0]).mask[0, 0]
    assert limited[:, 2:].eq(0).all() and limited[:, :2].eq(1).all()


def test_flips_mirror_depth_image_and_mask_together(tmp_path):
    depth = _slope()
    depth[:8, :8] = 0
    _write(tmp_path / "set", "a", _picture(), depth)
    dataset = _made(tmp_path, DepthSettings(Sizes(32), flips=True))
    plain, mirrored = (dataset.batch([0], [flip]) for flip in (False, True))
    for name in ("latent", "image", "mask"):
        torch.testing.assert_close(getattr(mirrored, name), getattr(plain, name).flip(-1))


def test_depth_is_cropped_as_its_image_and_never_stretched(tmp_path):
    """A wide pair at half its size: columns 16 to 80 of 96, every other pixel; the image's own crop is the same."""
    depth = _slope(96, 64)
    picture = np.repeat((depth * 25)[..., None], 3, axis=-1).astype(np.uint8)
    _write(tmp_path / "set", "a", picture, depth)
    batch = _made(tmp_path).batch([0])
    log = np.log(depth[0, 16:80])[1::2]
    low, high = np.quantile(log.repeat(32), [0.01, 0.99])
    expected = ((log - low) / (high - low)).clip(0, 1).reshape(4, 8).mean(1)
    np.testing.assert_allclose(batch.latent[0, 0, 0].numpy(), expected, atol=1e-5)
    seen = (picture[0, 16:80, 0] / 255).reshape(4, 16).mean(1)
    np.testing.assert_allclose(batch.image[0, 0, 1].numpy(), seen, atol=0.01)


def test_nothing_is_encoded_twice_and_changes_are_seen(tmp_path):
    for name in "ab":
        _write(tmp_path / "set", name, _picture(), _slope() * (1 if name == "a" else 2))
    encoder = _Encoder()
    first = _made(tmp_path, encoder=encoder)
    assert encoder.calls == 3  # two depths, and the image that both have
    assert _made(tmp_path, encoder=encoder).identity() == first.identity() and encoder.calls == 3
    limited = _made(tmp_path, DepthSettings(Sizes(32), limit=6.0), encoder)
    assert encoder.calls == 5 and limited.identity() != first.identity()


def test_pairs_that_cannot_be_used_are_named_with_the_reason(tmp_path):
    _write(tmp_path / "set", "good", _picture(), _slope())
    _write(tmp_path / "set", "empty", _picture(40, 40), np.zeros((40, 40), np.float32))
    _write(tmp_path / "set", "small", _picture(48, 48), _slope(24, 24))
    _write(tmp_path / "set", "alone", _picture(), _slope())
    (tmp_path / "set" / "depth" / "alone.npy").unlink()
    _write(tmp_path / "set", "holes", _picture(56, 56), np.where(np.indices((56, 56)).sum(0) % 2, _slope(56, 56), 0))
    dataset = _made(tmp_path)
    assert [item.name for item in dataset.items] == ["good"]
    assert "none of its depth is valid" in dataset.skipped["empty"]
    assert "its depth is 24×24 px, the image 48×48; give depth of the image's size" in dataset.skipped["small"]
    assert "no square of 8×8 pixels of its depth is valid" in dataset.skipped["holes"]
    text = dataset.summary()
    assert "3 unreadable and skipped" in text and "1 files without their other half are not used: images/alone" in text


def test_colours_given_as_depth_are_refused(tmp_path):
    for part in ("images", "depth"):
        (tmp_path / "set" / part).mkdir(parents=True)
        Image.fromarray(_picture()).save(tmp_path / "set" / part / "a.png")
    with pytest.raises(ValueError, match="none of its 1 images can be read: a .*8-bit"):
        _made(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"layout": "kitti"}, "layout must be one of auto, folders"), ({"limit": -1.0}, "max_depth must be at least 0")],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        DepthSettings(Sizes(32), **settings)
