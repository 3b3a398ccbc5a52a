"""Image and depth pairs in folders, and what each data set means by depth."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..alignment.precision import exact
from ..files import PICTURES
from .choices import LAYOUTS
from .codec import FARTHEST, valid_pixels
from .files import read_depth

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
DEPTHS = (".exr", ".npy", ".npz", ".png", ".hdf5", ".h5")
_NOT_READ = (".pfm", ".dpt", ".mat", ".pt", ".raw")
"""Extensions of depth files of other programs: they are named."""

_IMAGE_FOLDERS, _DEPTH_FOLDERS, _SUFFIX = ("images", "image", "rgb"), ("depth", "depths"), "_depth"
_KNOWN = frozenset({*IMAGES, *DEPTHS, *PICTURES, *_NOT_READ})
_HYPERSIM_FOCAL = 886.81 / 1024  # of the width
_VKITTI2_FAR = 80.0
_HYPERSIM = re.compile(
    r"(?:(?P<scene>.+)/)?images/(?P<camera>scene_cam_\d+)_(?:final_preview|geometry_hdf5)"
    r"/(?P<frame>frame\.\d+)\.(?P<kind>tonemap\.jpg|depth_meters\.hdf5)"
)
_VKITTI2 = re.compile(
    r"(?:.*/)?(?P<scene>Scene\d+)/(?P<variation>[^/]+)/frames/(?P<kind>rgb|depth)/(?P<camera>Camera_\d+)"
    r"/(?:rgb|depth)_(?P<frame>\d+)\.(?:jpg|png)"
)
_EXPECTED = {
    "folders": "an image such as images/a.png with depth/a.exr, or a.png with a_depth.exr (exr, npy, npz, png)",
    "hypersim": "images/scene_cam_00_final_preview/frame.0000.tonemap.jpg with"
    " images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5, in a folder for each scene",
    "vkitti2": "Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg with .../frames/depth/Camera_0/depth_00000.png",
}


@dataclass(frozen=True)
class Pair:
    """An image and its depth.

    Args:
        name: of the pair inside its folder, with "/".
        image, depth: the files.
        convention: "planar" (depth along the viewing direction, in the file's own unit), "hypersim" (metres from the
            camera's centre) or "vkitti2" (centimetres along the viewing direction, 80 m and more is no depth).
    """

    name: str
    image: Path
    depth: Path
    convention: str


class Found(NamedTuple):
    """What is in a folder.

    Args:
        pairs: sorted by name.
        unpaired: names of the images without depth and of the depths without image.
        unread: names of the pictures and depths of a format that is not read, at least where they lie.
    """

    pairs: list[Pair]
    unpaired: list[str]
    unread: list[str]


class _File(NamedTuple):
    """A file of a layout: the name that it shares with its other half."""

    key: str
    is_depth: bool
    path: Path


def find_pairs(folder: Path, layout: str = "auto") -> Found:
    """The pairs in a folder and its subfolders; hidden files and linked folders are not read.

    folders: images in a folder images, image or rgb with depth of the same name in a folder depth or depths, or both
    side by side, the depth with _depth added. hypersim: Hypersim's tone-mapped previews and distances. vkitti2:
    Virtual KITTI 2, its rgb and depth in one folder or in two. auto: whichever of the two data sets it is, else
    folders.

    Raises:
        ValueError: an unknown layout, no pair (it says what was expected), or two files that claim one name.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    files = sorted(_files(folder, {*IMAGES, *DEPTHS}))
    tried = ("hypersim", "vkitti2", "folders") if layout == "auto" else (layout,)
    found = Found([], [], [])
    for layout in tried:
        found = _paired([file for path in files if (file := _SORTERS[layout](path, folder))], layout, folder)
        if found.pairs:
            return found._replace(unread=_unread(folder, layout))
    expected = "; or ".join(_EXPECTED[layout] for layout in reversed(tried))
    lonely = f" ({len(found.unpaired)} without its other half, such as {found.unpaired[0]})" if found.unpaired else ""
    if unread := _unread(folder, tried[-1]):
        lonely += f" ({len(unread)} of a format that is not read there, such as {unread[0]})"
    raise ValueError(f"folder '{folder.name}' holds no pair of image and depth{lonely}; expected {expected}")


def folder_state(folder: Path) -> str:
    """Digest of the names, sizes and times of the files that `find_pairs` looks at; changes when one of them does."""
    stats = ((path, path.stat()) for path in sorted(_files(folder, _KNOWN)))
    states = [(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def load_pair(pair: Pair, unit: str = "auto") -> tuple[Tensor, Tensor]:
    """Depth (H, W) float32 in metres along the viewing direction, and where it is valid (H, W) bool.

    Args:
        pair: from `find_pairs`.
        unit: of the files' numbers in layout folders, see `files.read_depth`; the data sets have their own.

    Raises:
        ValueError: the depth cannot be read, see `files.read_depth`.
    """
    if pair.convention == "vkitti2":
        depth = read_depth(pair.depth, "centimetres")
        return depth, valid_pixels(depth, _VKITTI2_FAR)
    if pair.convention == "hypersim":
        distance = read_depth(pair.depth, "metres")
        depth = distance_to_planar(distance, _HYPERSIM_FOCAL * distance.shape[1])
    else:
        depth = read_depth(pair.depth, unit)
    return depth, valid_pixels(depth, FARTHEST)


def distance_to_planar(distance: Tensor, focal: float) -> Tensor:
    """Depth along the viewing direction of distances to the camera's centre: z = d f / sqrt(u² + v² + f²).

    u and v are the pixel centres' places from the middle of the image. Calculated in float64, returned in the
    distance's dtype.

    Args:
        distance: (..., H, W), any unit.
        focal: pixels, the same in x and y; greater than 0.

    Raises:
        ValueError: focal is not positive.
    """
    if not focal > 0:
        raise ValueError(f"focal must be greater than 0 pixels, not {focal}")
    height, width = distance.shape[-2:]
    values = exact(distance)
    u = torch.arange(width, dtype=values.dtype, device=values.device) - (width - 1) / 2
    v = torch.arange(height, dtype=values.dtype, device=values.device) - (height - 1) / 2
    ray = (u.square() + v.square()[:, None] + focal * focal).sqrt()
    return (values * (focal / ray)).to(distance.dtype).to(distance.device)


def _files(folder: Path, extensions: Collection[str]) -> Iterator[Path]:
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        if path.suffix.lower() in extensions and not any(part.startswith(".") for part in inside):
            yield path


def _unread(folder: Path, layout: str) -> list[str]:
    """Names of pictures and depths that no layout reads, or, among images and depth by name, not where they lie."""
    names = []
    for path in sorted(_files(folder, _KNOWN)):
        readable = path.suffix.lower() in {*IMAGES, *DEPTHS}
        if not readable or (layout == "folders" and _in_folders(path, folder) is None):
            names.append(path.relative_to(folder).as_posix())
    return names


def _paired(files: list[_File], layout: str, folder: Path) -> Found:
    halves: tuple[dict[str, Path], dict[str, Path]] = ({}, {})
    for file in files:
        other = halves[file.is_depth].setdefault(file.key, file.path)
        if other != file.path:
            names = " and ".join(f"'{path.relative_to(folder).as_posix()}'" for path in (other, file.path))
            raise ValueError(f"{names} are both the {'depth' if file.is_depth else 'image'} of '{file.key}'; keep one")
    images, depths = halves
    convention = "planar" if layout == "folders" else layout
    pairs = [Pair(key, images[key], depths[key], convention) for key in sorted(images.keys() & depths.keys())]
    lonely = [half[key] for half in halves for key in half.keys() - {pair.name for pair in pairs}]
    unpaired = sorted(path.relative_to(folder).as_posix() for path in lonely)
    return Found(pairs, unpaired, [])


def _in_folders(path: Path, folder: Path) -> _File | None:
    parts = path.relative_to(folder).parts
    place = next((i for i, part in enumerate(parts[:-1]) if part.lower() in (*_IMAGE_FOLDERS, *_DEPTH_FOLDERS)), None)
    if place is None:
        stem = path.stem
        is_depth = path.suffix.lower() in DEPTHS and stem.lower().endswith(_SUFFIX)
        stem, above = stem[: -len(_SUFFIX)] if is_depth else stem, parts[:-1]
    else:
        is_depth = parts[place].lower() in _DEPTH_FOLDERS
        stem, above = path.stem, parts[:place] + parts[place + 1 : -1]
    if path.suffix.lower() not in (DEPTHS if is_depth else IMAGES):
        return None
    return _File("/".join((*above, stem)), is_depth, path)


def _in_hypersim(path: Path, folder: Path) -> _File | None:
    found = _HYPERSIM.fullmatch(path.relative_to(folder).as_posix())
    if not found:
        return None
    names = (found["scene"], found["camera"], found["frame"])
    return _File("/".join(filter(None, names)), found["kind"].startswith("depth"), path)


def _in_vkitti2(path: Path, folder: Path) -> _File | None:
    found = _VKITTI2.fullmatch(f"{folder.name}/{path.relative_to(folder).as_posix()}")  # a scene alone will do
    if not found:
        return None
    names = (found["scene"], found["variation"], found["camera"], found["frame"])
    return _File("/".join(names), found["kind"] == "depth", path)


_SORTERS: dict[str, Callable[[Path, Path], _File | None]] = {
    "folders": _in_folders,
    "hypersim": _in_hypersim,
    "vkitti2": _in_vkitti2,
}
