"""LoadImage and SaveImage of the headless host."""

import numpy as np
import pytest
import torch
from PIL import Image

from diff2flow_nodes.hosts import HostError, use
from diff2flow_nodes.hosts.headless import HeadlessHost, core_nodes
from diff2flow_nodes.hosts.headless.images import load_image, save_images
from diff2flow_nodes.tests.bare_files import png_header
from diff2flow_nodes.training.images import image_facts, read_image


@pytest.fixture
def host(tmp_path):
    made = HeadlessHost(tmp_path / "models", tmp_path / "input", tmp_path / "output")
    use(made)
    return made


def test_images_come_back_as_they_were_saved(host):
    images = torch.rand(2, 10, 12, 3, generator=torch.Generator().manual_seed(0))
    entries = save_images(images, host.folder("output"), "a/%width%x%height%_", "output", {"1": "ü"}, {"workflow": [1]})
    assert entries == [{"filename": f"12x10__{i:05}_.png", "subfolder": "a", "type": "output"} for i in (1, 2)]
    image, mask = core_nodes.LoadImage().load("a/12x10__00002_.png [output]")
    assert torch.equal(image, (images[1:] * 255).floor() / 255) and torch.equal(mask, torch.zeros(1, 64, 64))
    with Image.open(host.path("output", "a/12x10__00001_.png")) as picture:
        assert picture.text == {"prompt": '{"1": "\\u00fc"}', "workflow": "[1]"}
    assert save_images(images[:1], host.folder("output"), "plain", "output", None, None)[0]["subfolder"] == ""


def test_transparency_becomes_a_mask(host):
    pixels = np.full((4, 6, 4), 200, np.uint8)
    pixels[:, :3, 3] = 0
    Image.fromarray(pixels).save(host.folder("input") / "clear.png")
    image, mask = core_nodes.LoadImage().load("clear.png")
    assert image.shape == (1, 4, 6, 3) and mask.shape == (1, 4, 6)
    assert mask[0, 0].tolist() == pytest.approx([1, 1, 1, 1 - 200 / 255, 1 - 200 / 255, 1 - 200 / 255])


def test_frames_become_a_batch_and_rotation_is_applied(host):
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue")]
    frames[0].save(host.folder("input") / "two.gif", save_all=True, append_images=frames[1:])
    assert load_image(host.path("input", "two.gif"))[0].shape == (2, 4, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(host.folder("input") / "turned.jpg", exif=exif)
    assert load_image(host.path("input", "turned.jpg"))[0].shape == (1, 8, 4, 3)


def test_broken_images_are_named(host):
    path = host.folder("input") / "broken.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(HostError, match="broken.png"):
        load_image(path)


def test_an_image_with_nan_is_not_saved(host):
    with pytest.raises(ValueError, match="NaN"):
        save_images(torch.full((1, 8, 8, 3), torch.nan), host.folder("output"), "x", "output", None, None)
    assert list(host.folder("output").iterdir()) == []


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_picture_that_declares_too_much_is_named_before_it_is_read(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # some packs switch Pillow's own bound off
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(20000, 20000))
    for read in (load_image, image_facts, lambda path: read_image(path, 8, 8)):
        with pytest.raises(ValueError, match="^'huge.png' (says|declares).*scale it down"):
            read(path)
