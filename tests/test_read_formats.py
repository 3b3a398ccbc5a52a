"""Which formats are read is said where the folder is chosen, and what is not read is named."""

import json
import re
import shutil

import numpy
import pytest
import torch
from help_pages import page_of

from diff2flow_nodes.depth import layouts
from diff2flow_nodes.nodes.texts import LOCALES
from diff2flow_nodes.tests.depth_pairs import disc_on_slope, write_image
from diff2flow_nodes.tests.training_fakes import CONTEXT_WIDTH
from diff2flow_nodes.training import images
from diff2flow_nodes.training.buckets import Sizes
from diff2flow_nodes.training.depth_folder import DepthSettings, depth_dataset
from diff2flow_nodes.training.encoding import Encoders

READ = {
    "Diff2FlowImageDataset": {*images.EXTENSIONS, *images._WITH_PLUGIN},
    "Diff2FlowDepthDataset": {*layouts.IMAGES, *layouts.DEPTHS},
}


@pytest.mark.parametrize("language", ["en", "de", "zh", "ja"])
@pytest.mark.parametrize("node", READ)
def test_the_folder_says_what_is_read_in_every_language(node, language):
    texts = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    _require_all(texts[node]["inputs"]["folder"]["tooltip"], READ[node])


@pytest.mark.parametrize("node", READ)
def test_the_help_says_what_is_read(node):
    [line] = [line for line in page_of(node).splitlines() if line.startswith("- **folder**")]
    _require_all(line, READ[node])


def _require_all(text, extensions):
    words = set(re.findall(r"[a-z0-9]+", text.lower()))
    assert not {extension[1:] for extension in extensions} - words


def _made(folder):
    encoders = Encoders(
        lambda image: torch.zeros(1, 4, image.shape[1] // 8, image.shape[2] // 8),
        lambda caption: (torch.zeros(1, 3, CONTEXT_WIDTH), None),
        "vae",
        "clip",
    )

    class Bar:
        update = close = lambda *_: None

    return depth_dataset(folder, folder.parent / "cache", DepthSettings(Sizes(64)), encoders, lambda total: Bar())


def _pair(folder, image="images/a.png", depth="depth/a.npy"):
    write_image(folder / image, 1)
    (folder / depth).parent.mkdir(exist_ok=True)
    numpy.save(folder / depth, disc_on_slope(1)[1])


UNREAD = (
    "images/b.heic",
    "images/b.jfif",
    "depth/b.pfm",
    "depth/c.tiff",
    "images/d.npy",
    "depth/e.webp",
    "f_depth.dpt",
)


def test_files_of_formats_that_the_depth_folder_does_not_read_are_named(tmp_path, caplog):
    folder = tmp_path / "rooms"
    _pair(folder)
    before = layouts.folder_state(folder)
    for name in (*UNREAD, "notes.txt", "images/a.json", ".hidden/x.heic"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"1")
    made = _made(folder)
    [note] = [note for note in made.notes if "of a format that is not read there" in note]
    assert note.startswith(f"{len(UNREAD)} files") and note in made.summary() and note in caplog.text
    assert layouts.find_pairs(folder).unread == sorted(UNREAD)
    assert layouts.folder_state(folder) != before  # the summary is made again


def test_a_folder_without_a_pair_names_what_it_does_not_read(tmp_path):
    folder = tmp_path / "rooms"
    _pair(folder)
    shutil.move(folder / "depth" / "a.npy", folder / "depth" / "a.pfm")
    with pytest.raises(ValueError, match=r"no pair .*1 of a format that is not read there, such as depth/a.pfm"):
        layouts.find_pairs(folder)


def test_nothing_is_said_where_everything_is_read(tmp_path):
    _pair(tmp_path / "rooms")
    assert _made(tmp_path / "rooms").notes == ()
