"""Depth in files: NPY, NPZ, EXR, 16-bit PNG and HDF5 to read, NPY, EXR and 16-bit PNG to write."""

from __future__ import annotations

import importlib
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from ..files import TooLargeError, confined, require_size, written_whole
from .choices import UNITS

_METRES = {"metres": 1.0, "millimetres": 1e-3, "centimetres": 1e-2}
_CHANNELS = ("Z", "Y", "R")
_DATASET = "dataset"
_WHITE = 65535
_ELSEWHERE = (
    "'{name}' keeps its depth in another file or behind a link, which is not followed; store the numbers in the file"
    " itself, as an array named dataset"
)


def read_depth(path: Path, unit: str = "auto") -> Tensor:
    """Depth (H, W) float32 in metres of a file; what the file marks as missing (0, NaN, infinite) is left as it is.

    .npy and .npz (its only array, or the one named depth), .exr (16- or 32-bit float; channel Z, else Y, else R, else
    the only one), 16-bit .png, .hdf5 and .h5 (the array named dataset, in the file itself). Nothing is unpickled, no
    other file is opened, and what a header declares is checked before memory is taken for it (`files.require_size`).

    Args:
        path: of the file.
        unit: of its numbers; auto: millimetres for 16-bit whole numbers, else metres.

    Raises:
        ValueError: an unknown unit or kind of file, a file that cannot be read or holds a colour or 8-bit picture, or
            a library that is missing; a file that declares more than is read, or points to other files.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"'{path.name}' is no depth file; use one of {', '.join(sorted(_READERS))}")
    values = _one_map(reader(path), path.name)
    if unit == "auto":
        unit = "millimetres" if values.dtype.kind in "iu" and values.dtype.itemsize == 2 else "metres"
    exact = values if unit == "metres" else values.astype(numpy.float64) * _METRES[unit]
    return torch.from_numpy(exact.astype(numpy.float32, order="C"))


def write_depth(path: Path, depth: Tensor, bounds: tuple[float, float] | None = None) -> None:
    """Writes depth (H, W) float32 whole: .npy and .exr (32-bit channel Z, zip) exactly, .png as 16-bit grey.

    Args:
        path: its extension chooses the format.
        depth: (H, W), in any unit.
        bounds: PNG only: the values that become 0 and 65535, what lies beyond is clipped; None: depth's own range.

    Raises:
        ValueError: another shape or extension, values for a PNG that are not finite, or a library that is missing.
    """
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"depth cannot be written as '{path.name}'; use one of {', '.join(sorted(_WRITERS))}")
    if depth.ndim != 2:
        raise ValueError(f"depth must be (H, W), not {tuple(depth.shape)}; write a file for each image")
    values = depth.detach().cpu().float().contiguous().numpy()
    if writer is _write_png:
        values = _in_16_bits(values, bounds)
    with written_whole(path) as temporary:
        writer(temporary, values)


def save_frames(folder: Path, prefix: str, frames: Tensor, extension: str) -> list[str]:
    """Writes a file for each frame, prefix_00001.exr and so on; counts on from what is there and overwrites nothing.

    PNGs of one call share one range: frames of a video do not flicker.

    Args:
        folder: written to; nothing leaves it.
        prefix: of the names; may have subfolders, with "/".
        frames: (B, H, W), in any unit.
        extension: ".exr", ".npy" or ".png".

    Returns:
        The names inside the folder, with "/".

    Raises:
        ValueError: a prefix that is not allowed, or what `write_depth` cannot write.
    """
    path = confined(folder, prefix)
    bounds = None
    if extension == ".png":
        _require_finite(frames)
        bounds = float(frames.min()), float(frames.max())
    first = _highest(path) + 1
    written = [path.with_name(f"{path.name}_{first + i:05d}{extension}") for i in range(len(frames))]
    for file, frame in zip(written, frames, strict=True):
        write_depth(file, frame, bounds)
    return [file.relative_to(folder).as_posix() for file in written]


def _highest(path: Path) -> int:
    """The highest N of the files name_N beside a path, whatever their extension and case; 0 if there is none."""
    if not path.parent.is_dir():
        return 0
    numbered = re.compile(re.escape(path.name) + r"_(\d+)\.[^.]+", re.IGNORECASE)
    found = (numbered.fullmatch(file.name) for file in path.parent.iterdir())
    return max((int(match[1]) for match in found if match), default=0)


def _read_numpy(path: Path) -> Any:
    with _said(path, "a NumPy file without unpickling", "save the plain numbers with numpy.save"):
        with open(path, "rb") as file:
            _require_array(path.name, *_declared(file))
        return numpy.load(path, allow_pickle=False)


def _read_npz(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        return _read_numpy(path)
    with _said(path, "a NumPy file without unpickling", "save the plain numbers with numpy.savez"):
        with numpy.load(path, allow_pickle=False) as archive:
            names = archive.files
            name = "depth" if "depth" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise _Told(f"'{path.name}' holds {names or 'nothing'}; give it one array, or call one depth")
            member = name if name in archive.zip.namelist() else f"{name}.npy"
            with archive.zip.open(member) as file:
                _require_array(path.name, *_declared(file))
            return archive[name]


def _declared(file: IO[bytes]) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype in the header of an array in NumPy's format."""
    version = numpy.lib.format.read_magic(file)
    read = numpy.lib.format.read_array_header_1_0 if version == (1, 0) else numpy.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _require_array(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """What is known of an array from its header: plain numbers, and not too many of them."""
    if dtype.hasobject:
        raise _Told(f"'{name}' holds pickled objects, no plain numbers; save the numbers only")
    if dtype.kind not in "iuf":
        raise _Told(f"'{name}' holds {dtype}, not depth; save it as 32-bit floating point numbers")
    require_size(name, shape)


def _read_exr(path: Path) -> Any:
    library = _library("OpenEXR", path)
    with _said(path, "an EXR picture", "save it again"):
        _require_exr_size(path.name, library.File(str(path), header_only=True).parts)
        channels = library.File(str(path), separate_channels=True).channels()
        by_name = {name: channel.pixels for name, channel in channels.items()}
    by_end = {name.rsplit(".", 1)[-1].upper(): pixels for name, pixels in reversed(by_name.items())}
    name = next((name for name in _CHANNELS if name in by_end), None)
    if name == "R" and any(not numpy.array_equal(by_end["R"], by_end.get(c, by_end["R"])) for c in "GB"):
        raise ValueError(f"'{path.name}' is an RGB picture, not depth: its channels R, G and B differ; give the depth")
    return by_end[name] if name else next(iter(by_name.values()))


def _require_exr_size(name: str, parts: Any) -> None:
    for part in parts:
        low, high = part.header["dataWindow"]
        width, height = (int(high[i]) - int(low[i]) + 1 for i in (0, 1))
        require_size(name, (len(part.header["channels"]), height, width))


def _read_png(path: Path) -> Any:
    with _said(path, "a picture", "save it again"):
        with Image.open(path) as image:
            require_size(path.name, image.size[::-1])
            mode, pixels = image.mode, numpy.asarray(image)
    if not mode.startswith("I"):
        kind = "an 8-bit grey" if mode in ("L", "1", "LA") else "an 8-bit RGB"
        raise ValueError(
            f"'{path.name}' is {kind} picture, not depth: give a 16-bit grey PNG in millimetres, or an EXR or NPY file"
            " in metres"
        )
    return pixels.astype(numpy.uint16)


def _read_hdf5(path: Path) -> Any:
    library = _library("h5py", path)
    with _said(path, "an HDF5 file", "download it again"), library.File(path, "r") as file:
        if _DATASET not in file.keys():
            raise _Told(f"'{path.name}' has no array named {_DATASET!r} but {list(file)}; name the depth so")
        if not isinstance(file.get(_DATASET, getlink=True), library.HardLink):
            raise _Told(_ELSEWHERE.format(name=path.name))
        found = file[_DATASET]
        if not isinstance(found, library.Dataset) or found.shape is None:
            raise _Told(f"'{path.name}' has a {_DATASET!r} that is no array; download it again")
        _require_inside(path.name, found)
        require_size(path.name, found.shape)
        require_size(path.name, found.chunks or ())
        return numpy.asarray(found[()]) if found.dtype.kind in "iuf" else numpy.empty(0, found.dtype)


def _require_inside(name: str, dataset: Any) -> None:
    """ValueError unless the numbers lie in the HDF5 file itself: in one piece or in chunks."""
    if dataset.is_virtual or dataset.external:
        raise _Told(_ELSEWHERE.format(name=name))


class _Told(ValueError):
    """A message that is already in our words."""


@contextmanager
def _said(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Whatever a library raises for a file, in one sentence; what is in our words stays as it is."""
    try:
        yield
    except (_Told, TooLargeError):
        raise
    except Exception as error:
        raise ValueError(f"'{path.name}' cannot be read as {kind} ({error}); {remedy}") from error


def _write_numpy(path: Path, values: Any) -> None:
    with open(path, "wb") as file:
        numpy.save(file, values, allow_pickle=False)


def _write_exr(path: Path, values: Any) -> None:
    library = _library("OpenEXR", path)
    header = {"compression": library.ZIP_COMPRESSION, "type": library.scanlineimage}
    library.File(header, {"Z": values}).write(str(path))


def _write_png(path: Path, values: Any) -> None:
    Image.fromarray(values).save(path, format="PNG")


def _in_16_bits(values: Any, bounds: tuple[float, float] | None) -> Any:
    _require_finite(torch.from_numpy(values))
    low, high = bounds or (float(values.min()), float(values.max()))
    scaled = (values.astype(numpy.float64) - low) / (high - low if high > low else 1.0)
    return (scaled.clip(0.0, 1.0) * _WHITE).round().astype(numpy.uint16)


def _require_finite(depth: Tensor) -> None:
    wrong = int((~depth.isfinite()).sum())
    if wrong:
        raise ValueError(f"depth has {wrong} values that are NaN or infinite, which a PNG cannot hold; save EXR or NPY")


def _one_map(values: Any, name: str) -> Any:
    """(H, W) numbers of what a file holds, axes of length 1 dropped."""
    if values.dtype.kind not in "iuf":
        raise ValueError(f"'{name}' holds {values.dtype}, not depth; save it as 32-bit floating point numbers")
    if values.dtype.itemsize == 1:
        raise ValueError(
            f"'{name}' is an 8-bit picture, not depth: save the depth as floating point numbers in metres"
            f" (its shape is {values.shape})"
        )
    kept = values
    while kept.ndim > 2 and 1 in (kept.shape[0], kept.shape[-1]):
        kept = kept[0] if kept.shape[0] == 1 else kept[..., 0]
    if kept.ndim != 2 or not kept.size:
        raise ValueError(f"'{name}' has the shape {values.shape}, not (height, width); save one depth a file")
    return kept


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        kind = {"OpenEXR": "EXR", "h5py": "HDF5"}[name]
        raise ValueError(
            f"{kind} files need the library {name}, which is not installed; run 'pip install {name}'"
        ) from error


_READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": _read_numpy,
    ".npz": _read_npz,
    ".exr": _read_exr,
    ".png": _read_png,
    ".hdf5": _read_hdf5,
    ".h5": _read_hdf5,
}
_WRITERS: dict[str, Callable[[Path, Any], None]] = {".npy": _write_numpy, ".exr": _write_exr, ".png": _write_png}
