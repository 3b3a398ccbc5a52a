"""Small images with exact depth, drawn by numpy: a disc before a slope."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..depth.files import write_depth

NEAR, FAR = 1.0, 8.0


def disc_on_slope(number: int, size: tuple[int, int] = (64, 64)) -> tuple[np.ndarray, np.ndarray]:
    """Image (height, width, 3) uint8 and depth (height, width) float32 in metres, another for each number."""
    height, width = size
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    down = rows / (height - 1)
    depth = FAR - (FAR - 2.0) * down
    middle = (0.3 + 0.1 * (number % 5)) * height, (0.25 + 0.07 * (number % 8)) * width
    disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < (0.18 * min(size)) ** 2
    depth[disc] = NEAR + 0.3 * (number % 3)
    image = np.stack([90 + 120 * down, 60 + 20 * (number % 4) + 0 * down, 200 - 140 * down], axis=-1)
    image[disc] = (230, 200 - 30 * (number % 4), 40)
    return image.astype(np.uint8), depth.astype(np.float32)


def write_image(path: Path, number: int, size: tuple[int, int] = (64, 64)) -> Path:
    """The image alone, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(disc_on_slope(number, size)[0]).save(path)
    return path


def write_frames(path: Path, numbers: list[int], size: tuple[int, int] = (64, 64)) -> Path:
    """The images as frames of a lossless WebP, which LoadImage takes for a batch; neighbours must differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(disc_on_slope(number, size)[0]) for number in numbers]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True, duration=40)
    return path


def write_pairs(folder: Path, count: int = 8, size: tuple[int, int] = (64, 64)) -> Path:
    """A folder of `count` pairs as Diff2Flow Depth Dataset takes them: images/0.png with depth/0.exr."""
    for number in range(count):
        write_image(folder / "images" / f"{number}.png", number, size)
        (folder / "depth").mkdir(exist_ok=True)
        _write_exr(folder / "depth" / f"{number}.exr", disc_on_slope(number, size)[1])
    return folder


def write_bad_pairs(folder: Path) -> Path:
    """Folders `rgb`, `smaller` and `invalid`, each of one pair that cannot be used."""
    for name in ("rgb", "smaller", "invalid"):
        write_image(folder / name / "images" / "0.png", 0)
        (folder / name / "depth").mkdir(exist_ok=True)
    write_image(folder / "rgb" / "depth" / "0.png", 0)
    _write_exr(folder / "smaller" / "depth" / "0.exr", disc_on_slope(0, (32, 48))[1])
    _write_exr(folder / "invalid" / "depth" / "0.exr", np.zeros((64, 64), np.float32))
    return folder


def _write_exr(path: Path, depth: np.ndarray) -> None:
    import torch

    write_depth(path, torch.from_numpy(depth))
