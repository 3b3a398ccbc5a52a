"""Pictures moved at random: turned, shrunk, shifted, mirrored, cut, and coloured differently."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Motion:
    """How far pictures are moved.

    Args:
        turn: degrees at most, either way.
        smallest, largest: range of the size, 1 being the picture's own.
        shift: of the picture's side at most, in either direction: of the smallest pictures; none of the largest.
        mirror: probability of a mirrored picture, where it may be.
    """

    turn: float
    smallest: float
    largest: float
    shift: float
    mirror: float = 0.5


def moved(pixels: Tensor, mirrored: Tensor, motion: Motion, random: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], each moved by its own turn, size and shift; white where nothing was.

    Args:
        pixels: uint8 (B, H, W, 3).
        mirrored: (B,), whether a picture may be mirrored.
    """
    count = len(pixels)
    turn, size, right, down, mirror = torch.rand(5, count, generator=random)
    turn = (2 * turn - 1) * math.radians(motion.turn)
    size = motion.smallest + size * (motion.largest - motion.smallest)
    flip = torch.where((mirror < motion.mirror) & mirrored, -1.0, 1.0)
    cosine, sine = turn.cos() / size, turn.sin() / size
    room = (motion.largest - size) / (motion.largest - motion.smallest)
    # the shift is of the drawing, in units of half a side, hence the negative factor 2
    shift = -2 * motion.shift * room * (2 * torch.stack([right, down]) - 1)
    rows = [
        torch.stack([cosine * flip, -sine * flip, (cosine * shift[0] - sine * shift[1]) * flip], dim=1),
        torch.stack([sine, cosine, sine * shift[0] + cosine * shift[1]], dim=1),
    ]
    images = pixels.movedim(-1, 1).float() / 255.0
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    # zeros outside the picture become white
    drawn = 1.0 + functional.grid_sample(images - 1.0, grid, mode="bicubic", align_corners=False)
    return drawn.clamp(0.0, 1.0)


def cut(images: Tensor, size: int, random: torch.Generator) -> Tensor:
    """A square (B, C, size, size) of images (B, C, H, W), at the same place of all."""
    top, left = (int(torch.randint(side - size + 1, (), generator=random)) for side in images.shape[2:])
    return images[..., top : top + size, left : left + size]


def recoloured(images: Tensor, share: float, random: torch.Generator) -> Tensor:
    """A share of the images (B, 3, H, W) with red, green and blue in another order, as inks on white."""
    order = torch.stack([torch.randperm(3, generator=random) for _ in range(len(images))])
    order = torch.where((torch.rand(len(images), generator=random) < share)[:, None], order, torch.arange(3))
    return images.gather(1, order[:, :, None, None].expand_as(images))
