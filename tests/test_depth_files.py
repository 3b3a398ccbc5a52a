"""Depth files and folders: what is written is what is read, and each data set's convention is its own."""

import io
import struct
import sys
import tracemalloc
import zipfile

import h5py
import numpy
import OpenEXR
import pytest
import torch
from PIL import Image

from diff2flow_nodes.depth import layouts
from diff2flow_nodes.depth.colors import COLORS, coloured
from diff2flow_nodes.depth.files import read_depth, save_frames, write_depth
from diff2flow_nodes.depth.layouts import distance_to_planar, find_pairs, load_pair
from diff2flow_nodes.tests.bare_files import png_header


def _depth(height=6, width=9):
    """Depths with all the bits that float32 has, and what a float may be."""
    depth = torch.exp(3 * torch.randn(height, width))
    depth[0, :4] = torch.tensor([0.0, float("inf"), 1e-30, -2.5])
    return depth


def _exr(path, channels):
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, channels).write(str(path))


def _png16(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numpy.asarray(values, dtype=numpy.uint16)).save(path)


def _rgb(path, size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 90, 10)).save(path)


@pytest.mark.parametrize("extension", [".exr", ".npy"])
def test_float_files_are_exact(tmp_path, extension):
    depth = _depth()
    write_depth(tmp_path / f"a{extension}", depth)
    again = read_depth(tmp_path / f"a{extension}")
    assert again.dtype == torch.float32 and torch.equal(again, depth)
    assert [file.name for file in tmp_path.iterdir()] == [f"a{extension}"]


def test_a_written_exr_is_one_zipped_float_channel(tmp_path):
    write_depth(tmp_path / "a.exr", torch.rand(5, 7).T)  # not contiguous
    with OpenEXR.File(str(tmp_path / "a.exr"), separate_channels=True) as file:
        assert {name: c.pixels.dtype for name, c in file.channels().items()} == {"Z": numpy.dtype("float32")}
        assert file.header()["compression"] == OpenEXR.ZIP_COMPRESSION and file.channels()["Z"].pixels.shape == (7, 5)


def test_png_is_16_bits_of_its_range(tmp_path):
    depth = torch.rand(16, 16) * 3 - 1
    write_depth(tmp_path / "a.png", depth)
    with Image.open(tmp_path / "a.png") as image:
        pixels = torch.from_numpy(numpy.asarray(image).astype(numpy.float64))
    assert pixels.min() == 0 and pixels.max() == 65535
    back = depth.min() + pixels / 65535 * (depth.max() - depth.min())
    assert (back - depth).abs().max() <= 0.51 / 65535 * float(depth.max() - depth.min())
    write_depth(tmp_path / "b.png", torch.tensor([[-1.0, 0.0, 5.0, 10.0, 11.0]]), (0.0, 10.0))
    with Image.open(tmp_path / "b.png") as image:
        assert numpy.asarray(image).tolist() == [[0, 0, 32768, 65535, 65535]]
    write_depth(tmp_path / "c.png", torch.full((2, 2), 7.0))
    assert not read_depth(tmp_path / "c.png").any()


def test_units(tmp_path):
    values = numpy.array([[0, 1, 1500, 65535]])
    _png16(tmp_path / "a.png", values)
    for unit, metres in (("auto", 1e-3), ("millimetres", 1e-3), ("centimetres", 1e-2), ("metres", 1.0)):
        torch.testing.assert_close(read_depth(tmp_path / "a.png", unit), torch.from_numpy(values * metres).float())
    numpy.save(tmp_path / "float.npy", values.astype(numpy.float64))
    numpy.save(tmp_path / "short.npy", values.astype(">u2"))
    assert read_depth(tmp_path / "float.npy")[0, 2] == 1500 and read_depth(tmp_path / "short.npy")[0, 2] == 1.5
    assert read_depth(tmp_path / "float.npy", "millimetres")[0, 2] == 1.5
    with pytest.raises(ValueError, match="unit must be one of auto, metres.*not 'feet'"):
        read_depth(tmp_path / "a.png", "feet")


@pytest.mark.parametrize(
    ("channels", "taken"),
    [
        ({"Z": 1, "Y": 2, "R": 3}, 1),
        ({"Y": 2, "A": 5}, 2),
        ({"view.depth.Z": 4, "A": 1}, 4),
        ({"R": 3, "G": 3, "B": 3, "A": 1}, 3),
        ({"depth": 6}, 6),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_exr_channels(tmp_path, channels, taken, dtype):
    _exr(tmp_path / "a.exr", {name: numpy.full((3, 5), value + 0.25, dtype) for name, value in channels.items()})
    assert torch.equal(read_depth(tmp_path / "a.exr"), torch.full((3, 5), taken + 0.25))


def test_npz_and_shapes_with_ones(tmp_path):
    depth = _depth().numpy()
    numpy.savez(tmp_path / "one.npz", anything=depth[None])
    numpy.savez_compressed(tmp_path / "named.npz", image=numpy.zeros(3), depth=depth[..., None])
    for name in ("one", "named"):
        assert numpy.array_equal(read_depth(tmp_path / f"{name}.npz").numpy(), depth)
    numpy.savez(tmp_path / "two.npz", a=depth, b=depth)
    with pytest.raises(ValueError, match=r"'two.npz' holds \['a', 'b'\]"):
        read_depth(tmp_path / "two.npz")


def test_hdf5(tmp_path):
    depth = numpy.random.default_rng(0).random((4, 6)).astype(numpy.float16)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["dataset"] = depth
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file["depths"] = depth
    assert numpy.array_equal(read_depth(tmp_path / "a.hdf5").numpy(), depth.astype(numpy.float32))
    with pytest.raises(ValueError, match=r"no array named 'dataset' but \['depths'\]"):
        read_depth(tmp_path / "b.hdf5")


def test_pictures_given_as_depth_are_refused(tmp_path):
    _rgb(tmp_path / "rgb.png")
    Image.new("L", (4, 3)).save(tmp_path / "grey.png")
    numpy.save(tmp_path / "rgb.npy", numpy.zeros((3, 4, 3), numpy.uint8))
    numpy.save(tmp_path / "float_rgb.npy", numpy.zeros((3, 4, 3), numpy.float32))
    _exr(tmp_path / "rgb.exr", {name: numpy.full((3, 4), i, "float32") for i, name in enumerate("RGB")})
    _rgb(tmp_path / "photo.jpg")
    for name, message in {
        "rgb.png": "is an 8-bit RGB picture, not depth: give a 16-bit",
        "grey.png": "is an 8-bit grey picture, not depth",
        "rgb.npy": "is an 8-bit picture, not depth",
        "float_rgb.npy": r"shape \(3, 4, 3\), not \(height, width\)",
        "rgb.exr": "is an RGB picture, not depth",
        "photo.jpg": "is no depth file; use one of",
    }.items():
        with pytest.raises(ValueError, match=f"'{name}' .*{message}|'{name}' {message}"):
            read_depth(tmp_path / name)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled_and_broken_files_are_named(tmp_path):
    trap = numpy.array([[_Trap()]], dtype=object)
    numpy.save(tmp_path / "trap.npy", trap, allow_pickle=True)
    numpy.savez(tmp_path / "trap.npz", depth=trap)
    with pytest.raises(ValueError, match="'trap.npy' holds pickled objects, no plain"):
        read_depth(tmp_path / "trap.npy")
    with pytest.raises(ValueError, match="'trap.npz' holds pickled objects"):
        read_depth(tmp_path / "trap.npz")
    for extension in ("npy", "npz", "exr", "png", "hdf5"):
        (tmp_path / f"broken.{extension}").write_bytes(b"not what it says")
        with pytest.raises(ValueError, match=f"'broken.{extension}' cannot be read"):
            read_depth(tmp_path / f"broken.{extension}")


@pytest.mark.parametrize(("library", "extension"), [("OpenEXR", "exr"), ("h5py", "hdf5")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library, extension):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"need the library {library}, which is not installed; run 'pip install"):
        read_depth(tmp_path / f"a.{extension}")


def test_what_cannot_be_written_is_named_and_leaves_no_file(tmp_path):
    for name, depth, message in (
        ("a.jpg", torch.ones(2, 2), "use one of .exr, .npy, .png"),
        ("a.exr", torch.ones(1, 2, 2), r"must be \(H, W\), not \(1, 2, 2\)"),
        ("a.png", torch.tensor([[1.0, float("nan")]]), "1 values that are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            write_depth(tmp_path / name, depth)
    assert list(tmp_path.iterdir()) == []


def test_frames_are_numbered_on_and_overwrite_nothing(tmp_path):
    frames = torch.rand(3, 4, 5)
    assert save_frames(tmp_path, "room/d", frames[:2], ".exr") == ["room/d_00001.exr", "room/d_00002.exr"]
    (tmp_path / "room" / "D_00007.NPY").write_bytes(b"mine")
    (tmp_path / "room" / "dd_00009.exr").write_bytes(b"another's")
    assert save_frames(tmp_path, "room/d", frames[2:], ".npy") == ["room/d_00008.npy"]
    assert torch.equal(read_depth(tmp_path / "room" / "d_00002.exr"), frames[1])
    assert torch.equal(read_depth(tmp_path / "room" / "d_00008.npy"), frames[2])
    for prefix in ("../d", "/d", "", "room/"):
        with pytest.raises(ValueError, match="the name"):
            save_frames(tmp_path, prefix, frames, ".exr")


def test_pngs_of_a_batch_share_one_range(tmp_path):
    frames = torch.stack([torch.full((2, 2), value) for value in (0.0, 1.0, 4.0)])
    names = save_frames(tmp_path, "d", frames, ".png")
    seen = [int(read_depth(tmp_path / name, "metres")[0, 0]) for name in names]
    assert seen == [0, 16384, 65535]
    frames[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_frames(tmp_path, "e", frames, ".png")
    assert not list(tmp_path.glob("e*"))


@pytest.mark.parametrize(("height", "width", "focal"), [(768, 1024, 886.81), (5, 4, 3.0), (48, 64, 55.4)])
def test_a_ray_traced_wall_becomes_flat(height, width, focal):
    """A wall z = 7 seen through each pixel's centre; its distances are the lengths of the rays."""
    distance = torch.empty(height, width, dtype=torch.float64)
    v, u = numpy.mgrid[0:height, 0:width]
    rays = numpy.stack([(u + 0.5 - width / 2) / focal, (v + 0.5 - height / 2) / focal, numpy.ones((height, width))])
    distance = torch.from_numpy(7.0 * numpy.linalg.norm(rays, axis=0))
    assert distance.max() > 7.3
    torch.testing.assert_close(distance_to_planar(distance, focal), torch.full_like(distance, 7.0), atol=0, rtol=1e-14)
    planar = distance_to_planar(distance.float().expand(2, -1, -1), focal)
    torch.testing.assert_close(planar, torch.full((2, height, width), 7.0), atol=0, rtol=2e-7)


def test_a_focal_length_must_be_positive():
    with pytest.raises(ValueError, match="focal must be greater than 0 pixels, not 0"):
        distance_to_planar(torch.ones(2, 2), 0)


def _hypersim(root, scene, frame, camera="scene_cam_00", size=(64, 48), with_depth=True):
    images = root / scene / "images"
    _rgb(images / f"{camera}_final_preview" / f"frame.{frame}.tonemap.jpg", size)
    _rgb(images / f"{camera}_final_preview" / f"frame.{frame}.gamma.jpg", size)
    if with_depth:
        width, height = size
        v, u = numpy.mgrid[0:height, 0:width]
        focal = 886.81 * width / 1024
        far = numpy.sqrt(((u - (width - 1) / 2) / focal) ** 2 + ((v - (height - 1) / 2) / focal) ** 2 + 1)
        file = images / f"{camera}_geometry_hdf5" / f"frame.{frame}.depth_meters.hdf5"
        file.parent.mkdir(parents=True, exist_ok=True)
        distance = (3.0 * far).astype(numpy.float32)
        distance[0, 0] = numpy.nan
        with h5py.File(file, "w") as opened:
            opened["dataset"] = distance


@pytest.mark.parametrize("layout", ["auto", "hypersim"])
def test_hypersim(tmp_path, layout):
    for scene, frame, camera in [("ai_001_001", "0000", "scene_cam_00"), ("ai_002_003", "0010", "scene_cam_01")]:
        _hypersim(tmp_path, scene, frame, camera)
    _hypersim(tmp_path, "ai_001_001", "0001", with_depth=False)
    pairs, unpaired, _ = find_pairs(tmp_path, layout)
    assert [pair.name for pair in pairs] == [
        "ai_001_001/scene_cam_00/frame.0000",
        "ai_002_003/scene_cam_01/frame.0010",
    ]
    assert unpaired == ["ai_001_001/images/scene_cam_00_final_preview/frame.0001.tonemap.jpg"]
    assert pairs[0].convention == "hypersim" and pairs[0].image.name == "frame.0000.tonemap.jpg"
    depth, valid = load_pair(pairs[0])
    assert not valid[0, 0] and int(valid.sum()) == 48 * 64 - 1
    torch.testing.assert_close(depth[valid], torch.full((48 * 64 - 1,), 3.0), atol=0, rtol=1e-6)
    assert [pair.name for pair in find_pairs(tmp_path / "ai_002_003", layout).pairs] == ["scene_cam_01/frame.0010"]


def _vkitti2(rgb_root, depth_root, scene="Scene01", variation="clone", camera="Camera_0", frame="00000"):
    frames = f"{scene}/{variation}/frames"
    _rgb(rgb_root / frames / "rgb" / camera / f"rgb_{frame}.jpg")
    _png16(
        depth_root / frames / "depth" / camera / f"depth_{frame}.png", [[0, 1, 150, 7999], [8000, 8001, 40000, 65535]]
    )


@pytest.mark.parametrize("layout", ["auto", "vkitti2"])
@pytest.mark.parametrize("roots", [("", ""), ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth")])
def test_vkitti2(tmp_path, layout, roots):
    rgb, depth = tmp_path / roots[0], tmp_path / roots[1]
    _vkitti2(rgb, depth)
    _vkitti2(rgb, depth, "Scene20", "15-deg-left", "Camera_1", "00012")
    _png16(depth / "Scene01/fog/frames/depth/Camera_0/depth_00003.png", [[1]])
    pairs, unpaired, _ = find_pairs(tmp_path, layout)
    assert [pair.name for pair in pairs] == ["Scene01/clone/Camera_0/00000", "Scene20/15-deg-left/Camera_1/00012"]
    assert len(unpaired) == 1 and unpaired[0].endswith("Scene01/fog/frames/depth/Camera_0/depth_00003.png")
    metres, valid = load_pair(pairs[1])
    assert valid.tolist() == [[False, True, True, True], [False, False, False, False]]
    torch.testing.assert_close(metres[valid], torch.tensor([0.01, 1.5, 79.99]))
    if not roots[0]:
        assert len(find_pairs(tmp_path / "Scene20", layout).pairs) == 1


def test_folders_of_images_and_depth(tmp_path):
    for name in ("images/a.jpg", "images/deep/b.png", "two/rgb/c.png", "images/alone.png", "d.png", ".hidden/e.png"):
        _rgb(tmp_path / name)
    for name in (
        "depth/a.npy",
        "depth/deep/b.exr",
        "two/depths/c.png",
        "depth/lonely.npy",
        "d_depth.exr",
        "f_depth.npy",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            _png16(tmp_path / name, [[1200, 0]])
        else:
            write_depth(tmp_path / name, torch.tensor([[1.2, 1e10]]))
    pairs, unpaired, _ = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a", "d", "deep/b", "two/c"]
    assert unpaired == ["depth/lonely.npy", "f_depth.npy", "images/alone.png"]
    assert all(pair.convention == "planar" for pair in pairs)
    for pair in pairs:
        depth, valid = load_pair(pair)
        assert depth[0, 0] == pytest.approx(1.2) and valid.tolist() == [[True, False]]


def test_two_files_of_one_name_are_named(tmp_path):
    for name in ("images/a.jpg", "images/a.png"):
        _rgb(tmp_path / name)
    with pytest.raises(ValueError, match="'images/a.jpg' and 'images/a.png' are both the image of 'a'; keep one"):
        find_pairs(tmp_path)


def test_folders_without_pairs_say_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="holds no pair.*images/a.png with depth/a.exr.*Scene01/clone.*scene_cam_00"):
        find_pairs(tmp_path)
    _rgb(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="1 without its other half, such as images/a.png"):
        find_pairs(tmp_path)
    with pytest.raises(ValueError, match="expected Scene01/clone/frames"):
        find_pairs(tmp_path, "vkitti2")
    with pytest.raises(ValueError, match="layout must be one of auto, folders, hypersim, vkitti2, not 'kitti'"):
        find_pairs(tmp_path, "kitti")


def test_a_picture_in_the_place_of_depth_is_refused(tmp_path):
    _rgb(tmp_path / "images" / "a.png")
    _rgb(tmp_path / "depth" / "a.png")
    [pair] = find_pairs(tmp_path).pairs
    with pytest.raises(ValueError, match="'a.png' is an 8-bit RGB picture, not depth"):
        load_pair(pair)


def test_every_layout_says_what_it_expects():
    assert set(layouts._EXPECTED) == set(layouts._SORTERS) == set(layouts.LAYOUTS) - {"auto"}


def test_colours():
    from matplotlib import colormaps

    depth = torch.linspace(-0.5, 1.5, 60).reshape(2, 5, 6)
    for name in COLORS:
        picture = coloured(depth, name)
        assert picture.shape == (2, 5, 6, 3) and picture.dtype == torch.float32
        assert picture.min() >= 0 and picture.max() <= 1 and len(picture.reshape(-1, 3).unique(dim=0)) > 20
    assert torch.equal(coloured(depth, "grey")[..., 1], depth.clamp(0, 1))
    numpy.testing.assert_allclose(coloured(depth, "turbo")[1, 4, 5], colormaps["turbo"](1.0)[:3], atol=1e-6)
    numpy.testing.assert_allclose(coloured(depth, "spectral")[0, 0, 0], colormaps["Spectral"](0.0)[:3], atol=1e-6)
    with pytest.raises(ValueError, match="must be one of grey, spectral, turbo, magma, viridis, not 'jet'"):
        coloured(depth, "jet")
    with pytest.raises(ValueError, match="60 values that are NaN"):
        coloured(depth * float("nan"), "grey")


def _outside(secret, path, kind):
    """An HDF5 file whose array named dataset is a text file, or lies in another HDF5 file."""
    other = path.with_name("other.h5")
    with h5py.File(other, "w") as file:
        file["values"] = numpy.ones((2, 3), "f4")
    with h5py.File(path, "w") as file:
        if kind == "external storage":
            file.create_dataset("dataset", shape=(1, 16), dtype="<u2", external=[(str(secret), 0, 32)])
        elif kind == "external link":
            file["dataset"] = h5py.ExternalLink(str(other), "values")
        elif kind == "soft link":
            file["elsewhere"] = h5py.ExternalLink(str(other), "/")
            file["dataset"] = h5py.SoftLink("/elsewhere/values")
        else:
            layout = h5py.VirtualLayout((2, 3), "f4")
            layout[:] = h5py.VirtualSource(str(other), "values", (2, 3))
            file.create_virtual_dataset("dataset", layout)


@pytest.mark.parametrize("kind", ["external storage", "external link", "soft link", "virtual"])
def test_an_hdf5_file_never_brings_another_file(tmp_path, kind):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"the words of another file, kept.")
    _outside(secret, tmp_path / "a.hdf5", kind)
    with pytest.raises(ValueError, match="'a.hdf5' keeps its depth in another file or behind a link"):
        read_depth(tmp_path / "a.hdf5")


def test_an_hdf5_array_in_chunks_and_under_a_second_name_is_read(tmp_path):
    values = numpy.arange(24, dtype="f4").reshape(4, 6)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["first"] = file.create_dataset("dataset", data=values, chunks=(2, 3), compression="gzip")
    assert numpy.array_equal(read_depth(tmp_path / "a.h5").numpy(), values)
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("dataset")
    with pytest.raises(ValueError, match="'group.h5' has a 'dataset' that is no array"):
        read_depth(tmp_path / "group.h5")


def _npy_header(shape):
    made = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(made, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return made.getvalue() + b"\0" * 64


def _huge_exr(path):
    """A small EXR file whose header is changed to declare 20000×20000."""
    _exr(path, {"Z": numpy.zeros((4, 4), "float32")})
    small, large = struct.pack("<4i", 0, 0, 3, 3), struct.pack("<4i", 0, 0, 19999, 19999)
    path.write_bytes(path.read_bytes().replace(small, large))


def _huge(path):
    if path.suffix == ".npy":
        path.write_bytes(_npy_header((60000, 60000)))
    elif path.suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("depth.npy", _npy_header((60000, 60000)))
    elif path.suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            file.create_dataset("dataset", shape=(60000, 60000), dtype="f4", chunks=(64, 64))
    elif path.suffix == ".exr":
        _huge_exr(path)
    else:
        path.write_bytes(png_header(20000, 20000))


@pytest.mark.parametrize("extension", [".npy", ".npz", ".hdf5", ".exr", ".png"])
def test_a_declared_size_is_checked_before_memory_is_taken(tmp_path, extension, monkeypatch):
    """Memory stays below 64 MiB where the numbers would take a gigabyte and more."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some packs set it
    path = tmp_path / f"huge{extension}"
    _huge(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"'huge{extension}' says that it holds .*0×.*scale it down"):
        read_depth(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 26
