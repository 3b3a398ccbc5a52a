"""A folder of images: what is read, what is encoded and when, what is said about the rest."""

import logging

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diff2flow_nodes.tests.training_fakes import SilentProgress
from diff2flow_nodes.training.buckets import Sizes
from diff2flow_nodes.training.encoding import Encoders
from diff2flow_nodes.training.folders import folder_state
from diff2flow_nodes.training.image_folder import FolderSettings, image_dataset
from diff2flow_nodes.training.images import read_image
from diff2flow_nodes.training.shards import ShardStore


class Counting:
    """Encoders that count."""

    def __init__(self, name="a"):
        self.images, self.texts, self.name = 0, [], name

    def image(self, image):
        self.images += 1
        latent = image.movedim(-1, 1)[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4]
        return latent.to(memory_format=torch.channels_last)

    def text(self, caption):
        self.texts.append(caption)
        return torch.full((1, 77 * (1 + caption.count("long")), 6), float(len(caption))), torch.ones(1, 2)

    def __call__(self):
        return Encoders(self.image, self.text, f"vae-{self.name}", f"clip-{self.name}")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(["a.png", "b.jpg", "c.webp"]):
        Image.new("RGB", (40 + 10 * i, 32), (80 * i, 10, 10)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"picture\n number {i} ")
    return folder


def _dataset(folder, encoders, progress=None, resolution=16, sizes=None, **options):
    settings = FolderSettings(sizes or Sizes(resolution), **options)
    cache = folder.parent / "cache"
    return image_dataset(folder, cache, settings, encoders(), lambda total: progress or SilentProgress())


def test_captions_latents_and_the_empty_caption(folder):
    encoders = Counting()
    dataset = _dataset(folder, encoders, trigger="inkstyle")
    assert [item.caption for item in dataset.items] == [f"inkstyle, picture number {i}" for i in range(3)]
    assert sorted(encoders.texts) == ["", *[f"inkstyle, picture number {i}" for i in range(3)]]
    batch = dataset.batch([2, 0])
    assert batch.latent.shape == (2, 4, 2, 2) and batch.latent.dtype == torch.float32
    assert batch.latent[0, 0, 0, 0] == pytest.approx(160 / 255, abs=0.02) and batch.latent[1, 0, 0, 0] < 0.02
    assert batch.context.shape == (2, 77, 6) and batch.pooled.shape == (2, 2)
    assert batch.sizes.tolist() == [[32, 60, 0, 7, 16, 16], [32, 40, 0, 2, 16, 16]]
    assert "3 images of 16×16 px, 3 different captions" in dataset.summary()


def test_a_second_run_encodes_nothing(folder):
    _dataset(folder, Counting())
    again = Counting()
    dataset = _dataset(folder, again)
    assert again.images == 0 and again.texts == [] and len(dataset) == 3


def test_only_what_changed_is_encoded_again(folder):
    _dataset(folder, Counting())
    Image.new("RGB", (20, 20), "blue").save(folder / "b.jpg")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "d.txt").write_text("fourth")
    again = Counting()
    assert len(_dataset(folder, again)) == 4
    assert again.images == 1 and again.texts == ["fourth"]


def test_other_weights_and_other_sizes_have_their_own_cache(folder):
    _dataset(folder, Counting("a"))
    other = Counting("b")
    _dataset(folder, other)
    assert other.images == 3 and len(other.texts) == 4
    larger = Counting("a")
    _dataset(folder, larger, resolution=24)
    assert larger.images == 3 and larger.texts == []


def test_captions_of_unequal_length_share_a_batch(folder):
    (folder / "a.txt").write_text("long")
    (folder / "b.txt").write_text("long long")
    batch = _dataset(folder, Counting()).batch([0, 1, 2])
    assert batch.context.shape == (3, 462, 6)  # of 154, 231 and 77: attention over repeated tokens is the same


def test_an_unreadable_image_is_named_skipped_and_counted(folder, caplog):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "broken.txt").write_text("broken")
    (folder / "text.jpg").write_text("no image")
    (folder / "text.txt").write_text("text")
    with caplog.at_level(logging.WARNING):
        dataset = _dataset(folder, Counting())
    assert len(dataset) == 3 and list(dataset.skipped) == ["broken.png", "text.jpg"]
    assert "2 unreadable and skipped: broken.png (" in dataset.summary()
    assert "broken.png" in caplog.text and "text.jpg" in caplog.text


def test_only_unreadable_images_are_an_error(folder):
    for name in ("a.png", "b.jpg", "c.webp"):
        (folder / name).write_text("no image")
    with pytest.raises(ValueError, match=r"none of its 3 images can be read: a\.png"):
        _dataset(folder, Counting())


def test_missing_captions_are_an_error_that_names_them_or_take_the_default(folder, caplog):
    (folder / "a.txt").unlink()
    (folder / "c.txt").unlink()
    encoders = Counting()
    with pytest.raises(ValueError, match=r"2 of the 3 images in 'pictures' have no caption \(a\.png, c\.webp\)"):
        _dataset(folder, encoders)
    assert encoders.images == 0
    with caplog.at_level(logging.WARNING):
        dataset = _dataset(folder, encoders, default_caption="a drawing")
    assert [item.caption for item in dataset.items] == ["a drawing", "picture number 1", "a drawing"]
    assert "2 without a caption file, given the default: a.png, c.webp" in dataset.summary()
    assert "2 images have no caption" in caplog.text


def test_an_empty_caption_file_is_an_empty_caption(folder):
    (folder / "a.txt").write_text("")
    assert _dataset(folder, Counting()).items[0].caption == ""


def test_a_caption_that_is_no_utf8_is_named(folder):
    (folder / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"'b\.txt' is not UTF-8"):
        _dataset(folder, Counting())


def test_an_empty_folder_says_so_and_where_images_are(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="'empty' holds no image"):
        _dataset(empty, Counting())
    folder.rename(empty / "inside")
    with pytest.raises(ValueError, match="subfolders are not read, but inside holds some"):
        _dataset(empty, Counting())


class Stop(BaseException):
    pass


def test_an_interruption_keeps_what_is_done(folder):
    first = Counting()
    with pytest.raises(Stop):
        _dataset(folder, first, SilentProgress(2, Stop()))
    second = Counting()
    assert len(_dataset(folder, second)) == 3
    assert first.images == 2 and second.images == 1


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_shard_is_named_and_made_again(folder, caplog, damage):
    reference = _dataset(folder, Counting()).batch([0, 1, 2])
    [shard] = (folder.parent / "cache").glob("latents-*/*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-10] if damage == "cut" else content[:-10] + b"\x55" + content[-9:])
    again = Counting()
    with caplog.at_level(logging.WARNING):
        dataset = _dataset(folder, again)
    assert again.images == 3 and again.texts == [] and str(shard) in caplog.text
    assert dataset.latents.damaged == [shard.name]
    assert torch.equal(dataset.batch([0, 1, 2]).latent, reference.latent)


def test_shards_are_filled_one_after_the_other(tmp_path):
    store = ShardStore(tmp_path, shard_size=2)
    for i in range(5):
        store.add({f"k{i}": torch.full((3,), float(i))})
    store.flush()
    assert [len(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [2, 2, 1]
    again = ShardStore(tmp_path)
    assert all(again.get(f"k{i}")[0] == i for i in range(5)) and again.shape("k4") == (3,)
    assert not list(tmp_path.glob("*.part"))


def test_encodings_that_are_not_finite_never_reach_the_cache(folder):
    encoders = Counting()
    encoders.image = lambda image: torch.full((1, 4, 2, 2), float("nan"))
    with pytest.raises(ValueError, match=r"'a\.png' holds NaN or infinity"):
        _dataset(folder, encoders)
    assert not list((folder.parent / "cache").glob("latents-*/*"))


def test_a_resolution_that_is_no_multiple_of_8_is_refused(folder):
    with pytest.raises(ValueError, match="resolution must be a multiple of 8 and at least 8, not 20"):
        _dataset(folder, Counting(), resolution=20)


def test_images_are_turned_cropped_and_laid_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    sideways = numpy.zeros((20, 40, 3), dtype=numpy.uint8)
    sideways[:, :20, 0] = 255
    Image.fromarray(sideways).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", 20, 40)
    assert turned.shape == (1, 40, 20, 3) and turned[0, 2, 10, 0] == 1 and turned[0, 37, 10, 0] == 0
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(read_image(tmp_path / "clear.png", 8, 8), torch.ones(1, 8, 8, 3))
    Image.fromarray(numpy.full((8, 8), 32896, dtype=numpy.uint16)).save(tmp_path / "grey16.png")
    assert read_image(tmp_path / "grey16.png", 8, 8)[0, 0, 0, 0] == pytest.approx(128 / 255, abs=1e-6)


def test_the_folders_state_changes_with_its_files(folder):
    before = folder_state(folder)
    assert folder_state(folder) == before
    (folder / "a.txt").write_text("another caption")
    assert folder_state(folder) != before
