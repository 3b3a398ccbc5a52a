"""Nodes for depth in files, and for how good a depth is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..depth.choices import SPACES, UNITS
from ..files import confined
from ..hosts import current
from .errors import names_node
from .products import lost
from .running import written
from .widgets import choice, line

CATEGORY = "Diff2Flow/depth"
_FORMATS = {"exr": ".exr", "npy": ".npy", "png16": ".png"}


class Diff2FlowLoadDepth:
    """Reads measured or rendered depth from a file."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("depth", "valid")
    OUTPUT_TOOLTIPS = (
        "Depth in metres, three equal channels, not limited to [0, 1]; 0 where there is none.",
        "1 where the file has depth, 0 where it is 0, negative, NaN, infinite or 1000 km and more.",
    )
    SEARCH_ALIASES = ("load EXR", "load depth map", "ground truth depth", "HDF5")
    DESCRIPTION = (
        "Reads true depth in metres from an EXR, NPY, NPZ, HDF5 or 16-bit PNG file in ComfyUI's input folder, for"
        " Diff2Flow Depth Metrics or to look at it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "file": line(
                    "depth.exr",
                    "A file in ComfyUI's input folder, by name ('depth.exr', 'room/frame_01.png'): .exr, .npy, .npz,"
                    " .hdf5 or a 16-bit grey .png. An 8-bit picture holds no metres and is refused.",
                ),
                "unit": choice(
                    UNITS,
                    "auto",
                    "Unit of the numbers in the file. auto: millimetres for 16-bit whole numbers (PNG), metres for"
                    " everything else.",
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return file is None or bool(_depth_file(file))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, file: str | None = None, unit: str | None = None) -> str:
        """Another string when the file was changed."""
        if file is None:
            return ""
        state = _depth_file(file).stat()
        return f"{state.st_size} {state.st_mtime_ns}"

    @names_node("Diff2Flow Load Depth")
    def load(self, file: str, unit: str = "auto") -> tuple[Any, Any]:
        from ..depth.codec import FARTHEST, valid_pixels
        from ..depth.files import read_depth
        from ..depth.sockets import depth_image

        depth = read_depth(_depth_file(file), unit)
        return depth_image(depth, valid_pixels(depth, FARTHEST))


class Diff2FlowSaveDepth:
    """Writes raw depth to files, a frame each."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("names",)
    OUTPUT_TOOLTIPS = ("Names of the files in ComfyUI's output folder, one a line.",)
    SEARCH_ALIASES = ("save EXR", "save depth map", "32-bit float", "16-bit PNG")
    DESCRIPTION = (
        "Saves raw depth in full precision, as it comes from Diff2Flow Depth: 32-bit EXR or NPY hold it exactly, 16-bit"
        " PNG in 65536 steps over the batch's range. One file for each frame; nothing is overwritten."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "depth": ("IMAGE", {"tooltip": "Raw depth, three equal channels in any unit; not a coloured preview."}),
                "filename_prefix": line(
                    "depth",
                    "Start of the file names in ComfyUI's output folder, without unit; may have subfolders"
                    " ('room/depth'). The files are called depth_00001.exr, depth_00002.exr and so on.",
                ),
                "format": choice(
                    tuple(_FORMATS),
                    "exr",
                    "exr: 32-bit float, channel Z, for compositing. npy: 32-bit float, for Python. Both keep every"
                    " value exactly. png16: 16-bit grey, black the smallest and white the largest value of the batch.",
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return filename_prefix is None or bool(_output_folder(filename_prefix))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> int:
        """Another number when a file that was written is gone."""
        return lost("Diff2FlowSaveDepth", inputs)

    @names_node("Diff2Flow Save Depth")
    def save(self, depth: Any, filename_prefix: str, format: str = "exr") -> dict[str, Any]:
        from ..depth.files import save_frames
        from ..depth.sockets import depth_of

        if format not in _FORMATS:
            raise ValueError(f"format must be one of {', '.join(_FORMATS)}, not {format!r}")
        folder = _output_folder(filename_prefix)
        names = save_frames(folder, filename_prefix, depth_of(depth, "depth"), _FORMATS[format])
        written(*(folder / name for name in names))
        return {"ui": {"file": names}, "result": ("\n".join(names),)}


class Diff2FlowDepthMetrics:
    """Compares a predicted depth with the true one."""

    CATEGORY = CATEGORY
    FUNCTION = "compare"
    RETURN_TYPES = ("STRING", "FLOAT", "FLOAT", "FLOAT")
    RETURN_NAMES = ("report", "abs_rel", "delta1", "rmse")
    OUTPUT_TOOLTIPS = (
        "The numbers in words.",
        "AbsRel: the error as a part of the true depth, its mean, without unit; 0 is perfect, under 0.1 is good.",
        "Part of the pixels that are right within a factor of 1.25, 0 to 1; 1 is perfect.",
        "Root of the mean squared error, in metres.",
    )
    SEARCH_ALIASES = ("AbsRel", "delta1", "RMSE", "compare depth", "depth accuracy")
    DESCRIPTION = (
        "Fits the predicted depth to the true one by the least-squares scale and shift of each image, as the field"
        " does, and measures AbsRel, delta1 and RMSE over the valid pixels: of each image, then the mean over them."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "prediction": (
                    "IMAGE",
                    {"tooltip": "Raw depth without unit, as Diff2Flow Depth gives it; of the size of truth in pixels."},
                ),
                "truth": ("IMAGE", {"tooltip": "True depth in metres, as Diff2Flow Load Depth gives it."}),
            },
            "optional": {
                "valid": (
                    "MASK",
                    {
                        "tooltip": "1 where pixels count, 0 where not; of the size of truth, one for each image or one"
                        " for all. Pixels where truth is 0, negative, NaN or infinite never count."
                    },
                ),
                "space": choice(
                    SPACES,
                    "log",
                    "Where scale and shift are fitted, without unit: log for Diff2Flow's raw depth, depth for"
                    " predictions proportional to metres, disparity for those proportional to 1/metres (MiDaS, Depth"
                    " Anything).",
                ),
            },
        }

    @names_node("Diff2Flow Depth Metrics")
    def compare(
        self, prediction: Any, truth: Any, valid: Any = None, space: str = "log"
    ) -> tuple[str, float, float, float]:
        from ..depth.sockets import compared

        return compared(prediction, truth, valid, space)


def _depth_file(name: str) -> Path:
    """The file by its name inside the input folder; ValueError if it is not there."""
    try:
        path = current().path("input", name)
    except ValueError as error:
        raise ValueError(f"file: {error}") from error
    if path.is_dir():
        raise ValueError(f"file: '{name}' is a folder; give the name of a file in it")
    return path


def _output_folder(prefix: str) -> Path:
    """The output folder, which files that begin with `prefix` stay in; ValueError if the prefix is not allowed."""
    folder = current().folder("output")
    try:
        confined(folder, prefix)
    except ValueError as error:
        raise ValueError(f"filename_prefix: {error}") from error
    return folder
