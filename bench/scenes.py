"""Synthetic scenes with exact depth and true captions: simple solids in a closed room, ray-marched.

    python -m diff2flow_nodes.bench.scenes --out FOLDER --count 200 --seed 0

writes images/0000.png with a caption 0000.txt beside it, and depth/0000.png (16 bit, millimetres) or .npy (metres).
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ..files import written_whole
from . import scene_light
from .scene_plan import HALF_WIDTH, Scene, is_clear, listing, plan

SIZE = 64
DEPTH_FORMATS = ("png16", "npy")
_FINER = 2
_BATCH = 16
_MILLIMETRES = 1000.0
_MOST = 10_000
_SHIFT, _TURN = 0.5, 0.12
_TRIES = 40


@dataclass(frozen=True)
class Scenes:
    """B scenes.

    Args:
        pictures: (B, H, W, 3) in [0, 1], float32, the mean of 2x2 rays a pixel.
        depth: (B, H, W) in metres along the optical axis, float32, through the pixels' centres; finite everywhere.
        owners: (B, H, W), which solid a pixel's centre shows, its place in `attributes[b].solids`; -1: the room.
        captions: true sentences.
        attributes: all that is known of each scene.
    """

    pictures: Tensor
    depth: Tensor
    owners: Tensor
    captions: list[str]
    attributes: list[Scene]


def scenes(indices: Sequence[int], seed: int, size: int = SIZE) -> Scenes:
    """The scenes of some indices, which depend on nothing but index and seed (and size).

    Args:
        indices: 0 and up.
        seed: another seed's scenes are others: for what a network must not have seen.
        size: width and height of the pictures in pixels, a multiple of 8.

    Raises:
        ValueError: no indices, a negative one, or a size that is no multiple of 8.
    """
    if not len(indices) or min(indices) < 0:
        raise ValueError(f"the indices must be one or more numbers from 0 up, not {list(indices)[:5]}")
    return rendered([plan(index, seed) for index in indices], size)


def rendered(plans: Sequence[Scene], size: int = SIZE) -> Scenes:
    """Pictures and depth of scenes.

    Raises:
        ValueError: a size that is no multiple of 8, from 8 up.
    """
    if size < 8 or size % 8:
        raise ValueError(f"the size must be a multiple of 8 from 8 up, not {size}; take {max(8, round(size / 8) * 8)}")
    batches = [_rendered(plans[i : i + _BATCH], size) for i in range(0, len(plans), _BATCH)]
    pictures, depth, owners = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Scenes(pictures, depth, owners, [scene.caption for scene in plans], list(plans))


def clip(index: int, seed: int, frames: int, size: int = SIZE) -> Scenes:
    """A scene in motion: the camera, or one solid, moves smoothly there and stops; a batch of frames.

    Every second index moves the camera. All frames have one caption, the list of the solids.

    Args:
        frames: 2 or more.

    Raises:
        ValueError: fewer frames, or as for `scenes`.
    """
    if frames < 2:
        raise ValueError(f"a clip needs at least 2 frames, not {frames}")
    if index < 0:
        raise ValueError(f"the index must be 0 or more, not {index}")
    scene = plan(index, seed)
    scene = replace(scene, relation=None, caption=listing(scene))
    random = Random(f"diff2flow clip {seed}/{index}")
    shares = [0.5 - 0.5 * math.cos(math.pi * frame / (frames - 1)) for frame in range(frames)]
    for _ in range(_TRIES if index % 2 else 0):
        moved = _solid_moved(scene, random, shares)
        if all(is_clear(frame) for frame in moved):
            return rendered(moved, size)
    return rendered(_camera_moved(scene, random, shares), size)


def directions(camera: Tensor, size: int, finer: int = 1) -> Tensor:
    """Rays (3, B, R) in the world through the pixels' centres, row by row; 1 long along the optical axis.

    Args:
        camera: (3, 3, B), as in `World`.
        size: pixels a side.
        finer: rays a pixel's side; all rays of a pixel follow each other.
    """
    place = (torch.arange(size * finer, dtype=camera.dtype) + 0.5) / (size * finer) * 2.0 - 1.0
    down, right = torch.meshgrid(place * HALF_WIDTH, place * HALF_WIDTH, indexing="ij")
    cells = torch.stack([right, -down]).unflatten(1, (size, finer)).unflatten(3, (size, finer))
    right, up = cells.permute(0, 1, 3, 2, 4).reshape(2, -1)
    return camera[0][..., None] * right + camera[1][..., None] * up + camera[2][..., None]


@torch.no_grad()
def _rendered(plans: Sequence[Scene], size: int) -> tuple[Tensor, Tensor, Tensor]:
    world = scene_light.world_of(plans)
    depth, owners = scene_light.first_hits(world, directions(world.camera, size))
    colours = scene_light.seen(world, directions(world.camera.float(), size, _FINER))
    rays = colours.movedim(0, -1).unflatten(1, (size, size, _FINER * _FINER)).unbind(3)
    pictures = sum(rays[1:], rays[0]) / len(rays)
    return pictures.clamp(0.0, 1.0), depth.float().unflatten(1, (size, size)), owners.unflatten(1, (size, size))


def _camera_moved(scene: Scene, random: Random, shares: Sequence[float]) -> list[Scene]:
    camera = scene.camera
    sideways, ahead, turn = (random.choice((-1, 1)) * x for x in (_SHIFT, 0.5 * _SHIFT, _TURN))
    x, y, _ = camera.position
    frames = []
    for share in shares:
        position = (x + share * sideways, y, share * max(ahead, 0.0))
        # It turns against its way, so that the solids stay in the picture.
        yaw = camera.yaw - share * math.copysign(turn, sideways)
        frames.append(replace(scene, camera=replace(camera, position=position, yaw=yaw)))
    return frames


def _solid_moved(scene: Scene, random: Random, shares: Sequence[float]) -> list[Scene]:
    """One solid slides over the floor and turns."""
    which, way = random.randrange(len(scene.solids)), random.uniform(-math.pi, math.pi)
    reach, turn = random.uniform(0.3, 1.0), random.uniform(-1.0, 1.0)
    solid = scene.solids[which]
    x, y, z = solid.centre
    frames = []
    for share in shares:
        centre = (x + share * reach * math.cos(way), y, z + share * reach * math.sin(way))
        moved = replace(solid, centre=centre, turn=solid.turn + share * turn)
        solids = (*scene.solids[:which], moved, *scene.solids[which + 1 :])
        frames.append(replace(scene, solids=solids))
    return frames


def write(folder: Path, count: int, seed: int, depth_format: str = "png16", size: int = SIZE) -> list[Path]:
    """Writes the first scenes of a seed; returns the pictures' paths.

    images/0000.png and its caption images/0000.txt; depth/0000.png, 16 bit, millimetres; or depth/0000.npy, float32,
    metres.

    Args:
        count: 1 to 10000.
        depth_format: "png16" or "npy".

    Raises:
        ValueError: another format, a count out of range, or as for `scenes`.
    """
    if depth_format not in DEPTH_FORMATS:
        raise ValueError(f"the depth format {depth_format!r} is none of {', '.join(DEPTH_FORMATS)}")
    if not 1 <= count <= _MOST:
        raise ValueError(f"count must be 1 to {_MOST}, not {count}")
    paths = []
    for first in range(0, count, _BATCH):
        numbers = range(first, min(first + _BATCH, count))
        made = scenes(numbers, seed, size)
        for number, picture, depth, text in zip(numbers, made.pictures, made.depth, made.captions, strict=True):
            paths.append(write_picture(Path(folder) / "images" / f"{number:04d}.png", picture, text))
            _write_depth(Path(folder) / "depth" / f"{number:04d}", depth, depth_format)
    return paths


def write_picture(path: Path, picture: Tensor, text: str) -> Path:
    """Writes a picture (H, W, 3) in [0, 1] as PNG and its caption beside it; returns the path."""
    from PIL import Image

    with written_whole(path) as temporary:
        Image.fromarray((picture * 255.0).round().to(torch.uint8).numpy()).save(temporary, format="PNG")
    with written_whole(path.with_suffix(".txt")) as temporary:
        temporary.write_text(text + "\n")
    return path


def _write_depth(stem: Path, depth: Tensor, depth_format: str) -> None:
    import numpy as np
    from PIL import Image

    if depth_format == "npy":
        with written_whole(stem.with_suffix(".npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, depth.numpy())
        return
    millimetres = (depth * _MILLIMETRES).round().numpy().astype(np.uint16)
    with written_whole(stem.with_suffix(".png")) as temporary:
        Image.fromarray(millimetres).save(temporary, format="PNG")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m diff2flow_nodes.bench.scenes", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write images and depth to")
    parser.add_argument("--count", type=int, default=200, help="how many scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default %(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side (default %(default)s)")
    parser.add_argument("--depth-format", choices=DEPTH_FORMATS, default="png16", help="millimetres, or metres")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths = write(options.out, options.count, options.seed, options.depth_format, options.size)
    logging.info("%d scenes in %s", len(paths), options.out)


if __name__ == "__main__":
    main()
