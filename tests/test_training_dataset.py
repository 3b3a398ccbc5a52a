"""A folder of images: what is read, what is encoded and when, what is said about the rest."""

import json
import logging
import os

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diff2flow_nodes.tests.training_fakes import SilentProgress, tiny_dataset
from diff2flow_nodes.training import image_folder, images, shards
from diff2flow_nodes.training.buckets import Sizes
from diff2flow_nodes.training.encoding import Encoders
from diff2flow_nodes.training.folders import folder_state
from diff2flow_nodes.training.image_batch import BatchSettings, batch_dataset
from diff2flow_nodes.training.image_folder import FolderSettings, image_dataset
from diff2flow_nodes.training.images import image_facts, read_image
from diff2flow_nodes.training.shards import ShardStore, Stores


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


def test_captions_of_unequal_length_are_continued_by_the_empty_one(folder):
    """4, 5, 6 and 7 chunks of 77 tokens make 7, not their common multiple."""
    _write(folder / "d.png")
    captions = {name: "long " * count for name, count in (("a", 3), ("b", 4), ("c", 5), ("d", 6))}
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption)
    encoders = Counting()
    encoders.text = lambda caption: (_numbered(caption), torch.ones(1, 2))
    dataset = _dataset(folder, encoders)
    batch = dataset.batch([0, 1, 2, 3])
    assert batch.context.shape == (4, 7 * 77, 6)
    for row, chunks in zip(batch.context, (4, 5, 6, 7), strict=True):
        own = [_numbered(" ".join(["long"] * (chunks - 1)))[0], *[_numbered("")[0]] * (7 - chunks)]
        assert torch.equal(row, torch.cat(own))
    assert dataset.batch([0, 0]).context.shape[1] == 4 * 77  # nothing is added where nothing is missing
    assert dataset.batch([0, 3], dropped=[True, False]).context.shape[1] == 7 * 77
    assert dataset.items[dataset.longest].name == "d.png"


def _numbered(caption):
    """A context whose tokens are all different, and other ones for every caption."""
    tokens = 77 * (1 + caption.count("long"))
    return torch.arange(tokens * 6).reshape(1, tokens, 6).float() + 1000 * len(caption)


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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_captions_are_read_by_their_byte_order_mark(folder, encoding):
    (folder / "b.txt").write_text("ein Käse, 猫", encoding=encoding)
    assert _dataset(folder, Counting()).items[1].caption == "ein Käse, 猫"


def test_utf16_without_a_mark_is_no_text(folder):
    (folder / "b.txt").write_bytes("a cat".encode("utf-16-le"))  # which is UTF-8 with zeros, too
    with pytest.raises(ValueError, match=r"'b\.txt' is not UTF-8 text \(it holds zeros"):
        _dataset(folder, Counting())


def _float_tiff(path, brightest):
    """A ramp from black to white in floating point, and the ramp's own values from 0 to 1."""
    ramp = numpy.linspace(0, 1, 32 * 32, dtype=numpy.float32).reshape(32, 32)
    Image.fromarray(ramp * numpy.float32(brightest)).save(path)
    path.with_suffix(".txt").write_text("a ramp")
    return torch.from_numpy(ramp)


@pytest.mark.parametrize("brightest", [1.0, 255.0])
def test_a_floating_point_tiff_is_as_bright_as_it_says(tmp_path, brightest):
    ramp = _float_tiff(tmp_path / "a.tif", brightest)
    seen = read_image(tmp_path / "a.tif", 32, 32)
    torch.testing.assert_close(seen[0], ramp[..., None].expand(-1, -1, 3), atol=0.6 / 255, rtol=0)


@pytest.mark.parametrize("brightest", [3.0, 65535.0, -1.0, float("nan")])
def test_a_floating_point_tiff_without_a_known_white_is_skipped_by_name(folder, brightest):
    _float_tiff(folder / "f.tif", brightest)
    dataset = _dataset(folder, Counting())
    assert len(dataset) == 3 and list(dataset.skipped) == ["f.tif"]
    assert "f.tif (its grey values go from" in dataset.summary()


def test_pictures_of_other_formats_are_read_or_named(folder, caplog, monkeypatch):
    image = Image.new("RGB", (32, 32), (200, 30, 10))
    image.save(folder / "d.gif")
    image.save(folder / "e.jfif", format="JPEG")
    for name in ("d", "e"):
        (folder / f"{name}.txt").write_text(name)
    for name in ("f.heic", "g.jxl", "h.jp2", ".i.jxl"):
        (folder / name).write_bytes(b"of a camera")
    registered = {**Image.registered_extensions()}
    for extension in (".avif", ".heic", ".jxl"):
        registered.pop(extension, None)
    monkeypatch.setattr(Image, "registered_extensions", lambda: registered)
    (folder / "k.avif").write_bytes(b"of a phone")
    before = folder_state(folder)
    with caplog.at_level(logging.WARNING):
        dataset = _dataset(folder, Counting())
    assert [item.name for item in dataset.items] == ["a.png", "b.jpg", "c.webp", "d.gif", "e.jfif"]
    said = "4 pictures are of a format that is not read and left out; save them as PNG or JPEG: f.heic, g.jxl"
    assert said in dataset.summary() and said in caplog.text
    (folder / "k.avif").unlink()
    assert folder_state(folder) != before
    torch.testing.assert_close(read_image(folder / "d.gif", 8, 8)[0, 0, 0] * 255, torch.tensor([200.0, 30.0, 10.0]))


def test_a_format_of_a_plugin_is_read_where_it_is_there(folder, monkeypatch):
    monkeypatch.setattr(Image, "registered_extensions", lambda: {".avif": "AVIF"})
    Image.new("RGB", (32, 32)).save(folder / "d.png")
    (folder / "d.png").rename(folder / "d.avif")  # Pillow goes by the content
    (folder / "d.txt").write_text("d")
    assert [item.name for item in _dataset(folder, Counting()).items][-1] == "d.avif"


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


def test_a_pooled_output_that_nothing_set_is_left_out(tmp_path):
    """As ComfyUI's for SD1: it reads a projection that the checkpoint does not have."""
    _write(tmp_path / "a.png", caption="a")
    encoders, text = Counting(), Counting().text
    encoders.text = lambda caption: (text(caption)[0], torch.tensor([[1.0, float("nan")]]))
    dataset = _dataset(tmp_path, encoders)
    assert dataset.batch([0]).pooled is None and torch.isfinite(dataset.batch([0]).context).all()


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


def test_crops_are_those_of_the_scaled_image(tmp_path):
    """In one go, or scaled as a whole and cropped where the sizes say: the same pixels."""
    draw = numpy.random.default_rng(3)
    smooth = Image.fromarray(draw.integers(0, 255, (9, 13, 3), dtype=numpy.uint8)).resize((130, 90), Image.BICUBIC)
    smooth.save(tmp_path / "a.png")
    whole = smooth.resize((46, 32), Image.LANCZOS).crop((7, 0, 39, 32))
    read = read_image(tmp_path / "a.png", 32, 32)[0] * 255
    assert (read - torch.from_numpy(numpy.asarray(whole).astype("float32"))).abs().max() < 6
    long = Image.new("L", (1, 20_000), 200)
    long.save(tmp_path / "long.png")
    assert read_image(tmp_path / "long.png", 512, 512).shape == (1, 512, 512, 3)


@pytest.mark.parametrize(("orientation", "size"), [(1, (40, 20)), (3, (40, 20)), (6, (20, 40)), (8, (20, 40))])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_the_original_size_is_that_of_the_turned_image(tmp_path, orientation, size, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / f"a.{ending}", exif=exif)
    facts = image_facts(tmp_path / f"a.{ending}")
    assert (facts.width, facts.height) == size and not facts.transparent


def _write(path, size=(32, 32), colour=(90, 20, 10), caption=None, mode="RGB"):
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_images_keep_their_shape_in_buckets(folder):
    _write(folder / "tall.png", (30, 61), caption="tall")
    sizes = Sizes(32, (16,), "aspect", bucket_step=8)
    encoders = Counting()
    dataset = _dataset(folder, encoders, sizes=sizes)
    assert encoders.images == 8 and {(item.width, item.height) for item in dataset.items} <= set(
        size for r in (16, 32) for size in [(r, r), *_sizes_of(r)]
    )
    by_name = {(item.name, item.width * item.height > 256): item for item in dataset.items}
    tall = by_name["tall.png", True]
    assert (tall.width, tall.height) == (24, 40)
    batch = dataset.batch([dataset.items.index(tall)])
    assert batch.latent.shape == (1, 4, 5, 3) and batch.sizes.tolist() == [[61, 30, 4, 0, 40, 24]]
    assert sorted(i for bucket in dataset.buckets for i in bucket) == list(range(8))
    for bucket in dataset.buckets:
        assert len({(dataset.items[i].width, dataset.items[i].height) for i in bucket}) == 1
    assert "8 images of" in dataset.summary() and "24×40: 1" in dataset.summary()
    assert dataset.nominal_size == (32, 32) and dataset.caption_counts["tall"] == 1
    with pytest.raises(ValueError, match="a batch has one size, but its items have"):
        dataset.batch(range(8))


def _sizes_of(resolution):
    from diff2flow_nodes.training.buckets import bucket_sizes

    return bucket_sizes(resolution, 8, 2.0)


def test_kohyas_folders_repeat_and_name(tmp_path, caplog):
    folder = tmp_path / "set"
    _write(folder / "own.png", caption="own")
    _write(folder / "10_ink wash" / "a.png", colour=(1, 2, 3))
    _write(folder / "10_ink wash" / "b.png", colour=(1, 2, 4), caption="river")
    _write(folder / "2_gold" / "a.png", colour=(7, 7, 7), caption="coin")
    _write(folder / "old" / "z.png", colour=(9, 9, 9))
    _write(folder / "0_never" / "z.png", colour=(9, 9, 9))
    with caplog.at_level(logging.WARNING):
        dataset = _dataset(folder, Counting())
    found = {item.name: (item.caption, item.repeats, item.source) for item in dataset.items}
    assert found == {
        "own.png": ("own", 1, "set"),
        "10_ink wash/a.png": ("ink wash", 10, "10_ink wash"),
        "10_ink wash/b.png": ("river", 10, "10_ink wash"),
        "2_gold/a.png": ("coin", 2, "2_gold"),
    }
    [bucket] = dataset.buckets
    assert [bucket.count(i) for i in range(4)] == [item.repeats for item in dataset.items]
    assert "23 with repeats: 1 × 1 in 'set', 2 × 10 in '10_ink wash', 1 × 2 in '2_gold'" in dataset.summary()
    assert "2 subfolders not read (only N_name is, as in 10_ink): 0_never, old" in dataset.summary()
    assert "subfolders not read" in caplog.text
    assert _dataset(folder, Counting(), default_caption="plain").items[1].caption == "plain"


def test_the_folder_itself_may_be_kohyas(tmp_path):
    _write(tmp_path / "3_cat" / "a.png")
    [item] = _dataset(tmp_path / "3_cat", Counting(), trigger="t").items
    assert (item.repeats, item.caption) == (3, "t, cat")


def test_caption_files_come_second_to_txt(folder):
    (folder / "a.caption").write_text("not this")
    (folder / "b.txt").rename(folder / "b.caption")
    assert [item.caption for item in _dataset(folder, Counting()).items] == [f"picture number {i}" for i in range(3)]


def _gradient(path, size=(40, 32)):
    row = numpy.linspace(0, 255, size[0]).astype(numpy.uint8)
    Image.fromarray(numpy.broadcast_to(row, size[::-1]).copy()).convert("RGB").save(path)


def _pooled(image):
    return nn.functional.avg_pool2d(image.movedim(-1, 1), 8)[:, [0, 1, 2, 0]]


def test_flips_mirror_latent_mask_and_crop(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    _gradient(folder / "a.png", (37, 32))
    (folder / "a.txt").write_text("a")
    left = Image.new("L", (37, 32), 0)
    left.paste(255, (0, 0, 18, 32))
    left.save(folder / "a.mask.png")
    encoders = Counting()
    encoders.image = _pooled
    dataset = _dataset(folder, encoders, resolution=32, flips=True, alpha="mask")
    plain, mirrored = dataset.batch([0], [False]), dataset.batch([0], [True])
    assert torch.allclose(plain.latent.flip(-1), mirrored.latent, atol=1e-6)
    assert not torch.allclose(plain.latent, mirrored.latent, atol=0.1)
    assert torch.equal(plain.mask.flip(-1), mirrored.mask) and plain.mask[0, 0, 0].tolist() == [1, 1, 0, 0]
    assert plain.sizes.tolist() == [[32, 37, 0, 2, 32, 32]] and mirrored.sizes.tolist() == [[32, 37, 0, 3, 32, 32]]
    assert "1 also mirrored" in dataset.summary() and "1 with a mask" in dataset.summary()
    assert torch.equal(_dataset(folder, encoders, resolution=32).batch([0], [True]).latent, plain.latent)


def test_flips_are_encoded_once_and_apart(folder):
    _dataset(folder, Counting())
    flipped = Counting()
    _dataset(folder, flipped, flips=True)
    assert flipped.images == 3
    again = Counting()
    _dataset(folder, again, flips=True)
    _dataset(folder, again)
    assert again.images == 0


def test_transparency_and_mask_files_weigh_the_loss(tmp_path):
    folder = tmp_path / "pictures"
    _write(folder / "a.png", (32, 32), caption="a")
    half = Image.new("RGBA", (32, 32), (200, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 32, 12))
    half.save(folder / "b.png")
    (folder / "b.txt").write_text("b")
    _write(folder / "c.png", (32, 32), colour=(5, 5, 5), caption="c")
    Image.new("L", (32, 32), 51).save(folder / "c-masklabel.png")
    encoders = Counting()
    dataset = _dataset(folder, encoders, resolution=32, alpha="mask")
    mask = dataset.batch([0, 1, 2]).mask
    assert mask.shape == (3, 1, 4, 4) and mask.dtype == torch.float32
    assert (mask[0] == 1).all() and mask[1, 0, :, 0].tolist() == [0, 0.5, 1, 1]
    assert torch.allclose(mask[2], torch.tensor(0.2))
    assert dataset.batch([0]).mask is None
    floored = _dataset(folder, encoders, resolution=32, alpha="mask", mask_floor=0.5)
    assert floored.batch([1]).mask[0, 0, :, 0].tolist() == [0.5, 0.75, 1, 1]
    white = _dataset(folder, encoders, resolution=32)
    assert encoders.images == 3 and white.batch([0, 1, 2]).mask is None  # RGB is on white in both
    assert torch.equal(white.batch([1]).latent, dataset.batch([1]).latent)
    assert "1 images have a mask file that is not used, as alpha is 'white': c.png" in white.summary()
    Image.new("L", (32, 32), 102).save(folder / "c-masklabel.png")
    changed = _dataset(folder, encoders, resolution=32, alpha="mask")
    assert encoders.images == 3 and torch.allclose(changed.batch([2]).mask, torch.tensor(0.4))


def test_a_mask_of_another_size_is_named(folder):
    Image.new("L", (32, 30), 51).save(folder / "a.mask.png")
    dataset = _dataset(folder, Counting(), alpha="mask")
    assert dataset.skipped == {"a.png": "its mask 'a.mask.png' is 32×30 px, not 40×32 like the image"}


def test_a_picture_that_is_called_like_a_mask_is_one(folder):
    _write(folder / "carnival.mask.png", caption="venice")
    assert "carnival.mask.png" in [item.name for item in _dataset(folder, Counting(), alpha="mask").items]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"alpha": "black"}, "alpha must be one of white, mask"), ({"mask_floor": 1.5}, "mask_floor must be from 0")],
)
def test_bad_folder_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        FolderSettings(Sizes(16), **values)


def test_dropped_captions_are_the_empty_one(folder):
    dataset = _dataset(folder, Counting())
    batch = dataset.batch([0, 1], dropped=[False, True])
    assert batch.captions == ("picture number 0", "") and batch.context[:, 0, 0].tolist() == [16, 0]


def test_a_split_keeps_the_sizes_of_a_picture_together(folder):
    for i in range(17):
        _write(folder / f"more{i}.png", (20 + i, 20), caption="more")
    dataset = _dataset(folder, Counting(), sizes=Sizes(16, (24,)))
    train, held = dataset.split(0.2, seed=1)
    names = [{item.name for item in part.items} for part in (train, held)]
    assert not names[0] & names[1] and len(names[1]) == 4 and len(train) + len(held) == 40
    assert [item.name for item in dataset.split(0.2, seed=1)[1].items] == [item.name for item in held.items]
    assert {item.name for item in dataset.split(0.2, seed=2)[1].items} != names[1]
    assert sum(map(len, train.buckets)) == len(train) and train.batch([0, 1][:1]).latent.shape[0] == 1
    assert all(len(part) > 0 for share in (0.001, 0.999) for part in dataset.split(share, 0))


def test_what_cannot_be_split_is_said(tmp_path):
    dataset = tiny_dataset(tmp_path, count=1)
    with pytest.raises(ValueError, match="has 1 image, of which none can be held out"):
        dataset.split(0.5, 0)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and below 1"):
            tiny_dataset(tmp_path / "b").split(share, 0)


def _batch(cache, encoders, images, captions="a", mask=None, **settings):
    settings = BatchSettings(**{"name": "graph", **settings})
    return batch_dataset(images, captions, mask, cache, settings, encoders(), lambda total: SilentProgress())


def test_images_of_the_graph_are_encoded_by_their_content(tmp_path):
    encoders = Counting()
    images = torch.rand(3, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    dataset = _batch(tmp_path, encoders, images, "one\n\nthree\n", repeats=2)
    assert [item.caption for item in dataset.items] == ["one", "", "three"] and encoders.images == 3
    batch = dataset.batch([2, 1])
    assert batch.latent.shape == (2, 4, 2, 3) and batch.sizes.tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert torch.equal(batch.latent[0, :3, 0, 0], images[2, 0, 0]) and dataset.buckets == ((0, 0, 1, 1, 2, 2),)
    mixed = torch.cat([images[1:2], 1 - images[:1]])
    rgba = torch.cat([mixed, torch.ones(2, 16, 24, 1)], dim=-1)
    assert [i.caption for i in _batch(tmp_path, encoders, rgba, "all").items] == ["all"] * 2 and encoders.images == 4


def test_masks_of_the_graph(tmp_path):
    images, masks = torch.rand(2, 16, 16, 3), torch.zeros(2, 16, 16)
    masks[0, :, :8] = 1
    both = _batch(tmp_path, Counting(), images, mask=masks, mask_floor=0.25).batch([0, 1]).mask
    assert both[:, 0, 0].tolist() == [[1, 0.25], [0.25, 0.25]]
    assert _batch(tmp_path, Counting(), images, mask=masks[:1]).batch([0, 1]).mask[1, 0, 0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": torch.rand(1, 20, 16, 3)}, "images: they are 16×20 px, but sides must be multiples of 8"),
        ({"captions": "a\nb\nc"}, "captions: it has 3 lines for 2 images"),
        ({"mask": torch.ones(1, 64, 64)}, "mask: it has 1 masks of 64×64 px for 2 images of 16×16 px"),
        ({"mask": torch.ones(3, 16, 16)}, "mask: it has 3 masks"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
        ({"mask_floor": -1.0}, "mask_floor must be from 0"),
    ],
)
def test_bad_images_of_the_graph_are_named(tmp_path, values, message):
    encoders = Counting()
    with pytest.raises(ValueError, match=message):
        _batch(tmp_path, encoders, **{"images": torch.rand(2, 16, 16, 3), **values})
    assert encoders.images == 0


def test_datasets_of_the_same_encoders_join(folder, tmp_path):
    first = _dataset(folder, Counting())
    second = _batch(tmp_path / "other", Counting(), torch.rand(2, 16, 16, 3), "two")
    third = _batch(tmp_path / "third", Counting(), torch.rand(1, 24, 24, 3), "three", name="last")
    joined = first.joined(second).joined(third)
    assert len(joined) == 6 and joined.name == "pictures + graph + last"
    batch = joined.batch([0, 4])
    assert torch.equal(batch.latent[0], first.batch([0]).latent[0])
    assert torch.equal(batch.latent[1], second.batch([1]).latent[0]) and batch.captions[1] == "two"
    assert joined.buckets == ((0, 1, 2, 3, 4), (5,)) and joined.latent_channels == 4
    assert set(joined.pictures) == {"pictures", "graph", "last"} and isinstance(joined.latents, Stores)
    with pytest.raises(ValueError, match="'pictures' and 'graph' were made with different VAEs"):
        first.joined(_batch(tmp_path / "o", Counting("b"), torch.rand(1, 16, 16, 3)))
    with pytest.raises(KeyError):
        joined.latents.get("nothing")


def _aged(path):
    """As if written a minute ago."""
    when = path.stat().st_mtime - 60
    os.utime(path, (when, when))


def test_files_are_looked_at_once(folder, monkeypatch):
    for file in folder.iterdir():
        _aged(file)
    first = _dataset(folder, Counting())
    looked = []
    monkeypatch.setattr(images, "content_key", lambda path: looked.append(path.name) or "other")
    again = _dataset(folder, Counting())
    assert looked == [] and again.items == first.items
    Image.new("RGB", (21, 20), "blue").save(folder / "b.jpg")
    assert _dataset(folder, Counting()).items[1].original_width == 21 and looked == ["b.jpg"]
    (folder.parent / "cache" / "files.json").write_text("{cut")
    _dataset(folder, Counting())
    assert len(looked) == 4


def test_looking_at_many_new_files_has_a_bar(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "_SHOW_FROM", 3)
    with pytest.raises(Stop):
        _dataset(folder, Counting(), SilentProgress(2, Stop()))
    assert not (folder.parent / "cache").exists() or not list((folder.parent / "cache").glob("latents-*"))


def _store(folder, count=3, age=True):
    store = ShardStore(folder, shard_size=1)
    for i in range(count):
        store.add({f"k{i}": torch.full((300,), float(i))})
    for path in folder.glob("*.safetensors") if age else ():
        _aged(path)
    return store


def test_shards_are_read_in_full_once(tmp_path, monkeypatch):
    _store(tmp_path)
    read = []
    whole = shards.require_whole
    monkeypatch.setattr(shards, "require_whole", lambda path: read.append(path.name) or whole(path))
    ShardStore(tmp_path)
    assert len(read) == 3 and len(json.loads((tmp_path / "verified.json").read_text())) == 3
    trusted = ShardStore(tmp_path)
    assert len(read) == 3 and "k2" in trusted
    assert trusted.get("k1")[0] == 1 and trusted.get("k1")[5] == 1 and len(read) == 4  # when first read from
    paths = sorted(tmp_path.glob("*.safetensors"))
    os.utime(paths[0])
    ShardStore(tmp_path)
    assert len(read) == 5


def test_damage_behind_the_record_is_found_when_read_and_made_good(tmp_path):
    _store(tmp_path)
    ShardStore(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-10] ^= 0x55
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    store = ShardStore(tmp_path)
    assert store.damaged == [] and store.get("k0")[0] == 0
    with pytest.raises(ValueError, match=f"{path.name} was damaged .*content does not match its checksum.*make the"):
        store.get("k1")
    again = ShardStore(tmp_path)
    assert again.damaged == [path.name] and "k1" not in again and "k2" in again and not path.exists()


def test_a_shard_that_is_removed_while_in_use_is_named(tmp_path):
    store = _store(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[2]
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} was damaged or removed"):
        store.get("k2")


def test_few_shards_are_open_at_a_time(tmp_path):
    store = _store(tmp_path, count=40)
    assert [store.get(f"k{i}")[0] for i in range(40)] == list(range(40)) and store.get("k0")[0] == 0
    assert len(store._open) == 32


def test_two_processes_may_fill_one_cache(tmp_path):
    one, two = ShardStore(tmp_path, 1), ShardStore(tmp_path, 1)
    two._next_number = one._next_number = lambda: 1
    one.add({"a": torch.zeros(2)})
    two.add({"b": torch.ones(2)})
    assert one.get("a")[0] == 0 and two.get("b")[0] == 1
    assert all(key in ShardStore(tmp_path) for key in "ab")


def test_the_folders_state_sees_repeats_masks_and_caption_files(folder):
    states = {folder_state(folder)}
    for name in ("4_new/x.png", "a.mask.png", "4_new/x-masklabel.png"):
        _write(folder / name)
        states.add(folder_state(folder))
    (folder / "a.caption").write_text("x")
    assert len(states | {folder_state(folder)}) == 5
    _write(folder / "other" / "x.png")
    assert len(states | {folder_state(folder)}) == 5
