"""The nodes that load, save and compare depth, on a small host."""

import numpy
import pytest
import torch
from PIL import Image

from diff2flow_nodes import hosts
from diff2flow_nodes.depth.files import read_depth, write_depth
from diff2flow_nodes.nodes import Diff2FlowDepthMetrics, Diff2FlowLoadDepth, Diff2FlowSaveDepth
from diff2flow_nodes.tests.training_fakes import FakeHost


@pytest.fixture
def host(tmp_path):
    host, before = FakeHost(tmp_path), list(hosts._chosen)
    hosts.use(host)
    yield host
    hosts._chosen[:] = before


def _image(depth):
    return depth[..., None].repeat(1, 1, 1, 3)


def test_a_file_becomes_metres_and_a_mask(host):
    depth = torch.tensor([[1.5, 0.0, float("nan")], [1e10, -1.0, 0.25]])
    (host.folder("input") / "room").mkdir()
    write_depth(host.folder("input") / "room" / "a.exr", depth)
    image, mask = Diff2FlowLoadDepth().load("room/a.exr")
    assert torch.equal(image, _image(torch.tensor([[[1.5, 0.0, 0.0], [0.0, 0.0, 0.25]]])))
    assert torch.equal(mask, torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])) and image.dtype == torch.float32
    Image.fromarray(numpy.array([[1500, 0]], numpy.uint16)).save(host.folder("input") / "b.png")
    assert Diff2FlowLoadDepth().load("b.png")[0][0, 0, 0, 0] == 1.5
    assert Diff2FlowLoadDepth().load("b.png", "centimetres")[0][0, 0, 0, 0] == 15


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.exr", "there is no 'none.exr'"), ("../a.exr", "not allowed"), ("", "is empty"), ("room", "is a folder")],
)
def test_bad_files_are_named_before_anything_runs(host, name, message):
    (host.folder("input") / "room").mkdir()
    assert message in str(Diff2FlowLoadDepth.VALIDATE_INPUTS(name)) and Diff2FlowLoadDepth.VALIDATE_INPUTS() is True
    with pytest.raises(ValueError, match=message) as caught:
        Diff2FlowLoadDepth().load(name)
    assert str(caught.value).startswith("Diff2Flow Load Depth: file: ")


def test_a_photo_is_no_depth(host):
    Image.new("RGB", (4, 3)).save(host.folder("input") / "photo.png")
    assert Diff2FlowLoadDepth.VALIDATE_INPUTS("photo.png") is True
    with pytest.raises(ValueError, match="Diff2Flow Load Depth: 'photo.png' is an 8-bit RGB picture, not depth"):
        Diff2FlowLoadDepth().load("photo.png")


def test_a_changed_file_is_read_again(host):
    file = host.folder("input") / "a.npy"
    write_depth(file, torch.ones(2, 2))
    before = Diff2FlowLoadDepth.IS_CHANGED("a.npy", "auto")
    assert before == Diff2FlowLoadDepth.IS_CHANGED("a.npy", "metres") and Diff2FlowLoadDepth.IS_CHANGED() == ""
    write_depth(file, torch.ones(2, 3))
    assert before != Diff2FlowLoadDepth.IS_CHANGED("a.npy", "auto")


@pytest.mark.parametrize("format", ["exr", "npy"])
def test_raw_depth_survives_a_save(host, format):
    raw = torch.randn(3, 8, 12) * 0.7 + 0.5  # beyond [0, 1]
    for first in (1, 4):
        [names] = Diff2FlowSaveDepth().save(_image(raw), "shot/depth", format)["result"]
        assert names.split("\n") == [f"shot/depth_{first + i:05d}.{format}" for i in range(3)]
        files = [host.folder("output") / name for name in names.split("\n")]
        assert torch.equal(torch.stack([read_depth(file) for file in files]), raw)
    assert len(list((host.folder("output") / "shot").iterdir())) == 6


def test_png16_has_the_range_of_the_batch(host):
    raw = torch.tensor([0.2, 0.7, 1.2]).reshape(3, 1, 1).expand(3, 4, 4)
    [names] = Diff2FlowSaveDepth().save(_image(raw), "d", "png16")["result"]
    seen = [int(read_depth(host.folder("output") / name, "metres")[0, 0]) for name in names.split("\n")]
    assert seen[0] == 0 and abs(seen[1] - 32768) <= 1 and seen[2] == 65535


def test_what_cannot_be_saved_is_named(host):
    raw = _image(torch.rand(1, 4, 4))
    for prefix in ("../d", "/tmp/d", "", "a/../../d"):
        assert str(Diff2FlowSaveDepth.VALIDATE_INPUTS(prefix)).startswith("filename_prefix: the name")
        with pytest.raises(ValueError, match="Diff2Flow Save Depth: filename_prefix: the name"):
            Diff2FlowSaveDepth().save(raw, prefix, "exr")
    assert Diff2FlowSaveDepth.VALIDATE_INPUTS("a/d") is True and Diff2FlowSaveDepth.VALIDATE_INPUTS() is True
    with pytest.raises(ValueError, match="Diff2Flow Save Depth: format must be one of exr, npy, png16, not 'jpg'"):
        Diff2FlowSaveDepth().save(raw, "d", "jpg")
    with pytest.raises(ValueError, match="Diff2Flow Save Depth: depth is a colour picture, not depth"):
        Diff2FlowSaveDepth().save(torch.rand(1, 4, 4, 3), "d", "exr")
    assert list(host.folder("output").iterdir()) == []


def test_metrics_of_a_perfect_and_of_a_wrong_prediction():
    truth = torch.exp(torch.rand(2, 10, 10) * 3)
    report, abs_rel, delta1, rmse = Diff2FlowDepthMetrics().compare(_image(0.3 * truth.log() + 0.1), _image(truth))
    assert abs_rel < 1e-5 and delta1 == 1.0 and rmse < 1e-4
    assert "AbsRel 0.0000" in report and "200 pixels of 2 images" in report and "in log" in report
    assert Diff2FlowDepthMetrics().compare(_image(1 / truth), _image(truth), None, "disparity")[1] < 1e-5
    wrong = Diff2FlowDepthMetrics().compare(_image(torch.rand(2, 10, 10)), _image(truth))
    assert wrong[1] > 0.3 and wrong[2] < 0.6


def test_a_mask_and_missing_truth_leave_pixels_out():
    truth = torch.exp(torch.rand(2, 10, 10) * 3)
    prediction, broken = truth.log(), truth.clone()
    broken[0, 0], broken[1, 0, :2] = 0.0, float("nan")
    prediction[:, 5:] = 0.4
    mask = torch.zeros(1, 10, 10)
    mask[:, :5] = 1.0
    report, abs_rel, _, _ = Diff2FlowDepthMetrics().compare(_image(prediction), _image(broken), mask)
    assert abs_rel < 1e-5 and "88 pixels of 2 images" in report
    assert Diff2FlowDepthMetrics().compare(_image(prediction), _image(broken))[1] > 0.05


@pytest.mark.parametrize(
    ("prediction", "truth", "mask", "message"),
    [
        (torch.rand(1, 48, 64), torch.ones(1, 24, 32), None, "prediction is 64×48 px and truth 32×24 px.*resize"),
        (torch.rand(3, 4, 4), torch.ones(2, 4, 4), None, "prediction has 3 images and truth 2"),
        (torch.rand(1, 4, 4), torch.ones(1, 4, 4), torch.ones(1, 4, 5), "valid is 5×4 px and truth 4×4 px"),
        (torch.rand(1, 4, 4), torch.zeros(1, 4, 4), None, "truth has no valid pixel in image 1 of 1"),
        (torch.rand(1, 4, 4), torch.ones(1, 4, 4), torch.zeros(1, 4, 4), "truth has no valid pixel"),
        (torch.full((1, 4, 4), float("nan")), torch.ones(1, 4, 4), None, "prediction has 16 values that are NaN"),
    ],
)
def test_what_cannot_be_compared_is_named(prediction, truth, mask, message):
    with pytest.raises(ValueError, match=f"Diff2Flow Depth Metrics: {message}"):
        Diff2FlowDepthMetrics().compare(_image(prediction), _image(truth), mask)


def test_colours_are_no_depth():
    depth = torch.ones(1, 4, 4, 3)
    with pytest.raises(ValueError, match="prediction is a colour picture"):
        Diff2FlowDepthMetrics().compare(torch.rand(1, 4, 4, 3), depth)
    with pytest.raises(ValueError, match="truth must be an IMAGE"):
        Diff2FlowDepthMetrics().compare(depth, depth[..., :2])
    with pytest.raises(ValueError, match="space must be one of log, depth, disparity"):
        Diff2FlowDepthMetrics().compare(depth, depth, None, "linear")
