"""What rays see in a scene: the first surface they meet, its texture, its light, hard shadows and gloss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .scene_plan import TEXTURES, Scene, Surface
from .scene_rays import ROOM, Solids, dot, local, normals, solid_hits, solids_of

_AMBIENT, _GLOSS, _SHARPNESS = 0.36, 0.45, 5
"""Light from everywhere; strength of a highlight; how often its cosine is squared."""
_LIGHTS = 2
_LIFT = 4e-3
_PLAIN, _STRIPES, _CHECKER = (TEXTURES.index(name) for name in ("plain", "stripes", "checker"))
_FLOOR, _CEILING, _BACK = 0, 1, 2
_INWARD = ((0.0, 1.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (-1.0, 0.0, 0.0))
"""Normals of floor, ceiling, back wall, left and right wall."""


@dataclass(frozen=True)
class Paint:
    """Textures of N (or (MOST, B)) surfaces: kind (*), index in TEXTURES; colours (2, 3, *); period (*) in metres."""

    kind: Tensor
    colours: Tensor
    period: Tensor


@dataclass(frozen=True)
class World:
    """B scenes as tensors.

    Args:
        origin: (3, B) of the camera.
        camera: (3, 3, B); camera[i] is the direction of the picture's right, up, and of the optical axis.
        room: (3, B), half width, height, back.
        floor, walls: of (B,) surfaces.
        coats: of (MOST, B) solids.
        lights, strengths: (_LIGHTS, 3, B); strength 0: none.
    """

    origin: Tensor
    camera: Tensor
    room: Tensor
    floor: Paint
    walls: Paint
    coats: Paint
    lights: Tensor
    strengths: Tensor
    solids: Solids


def world_of(scenes: Sequence[Scene]) -> World:
    """The scenes as tensors, float64."""

    def stacked(rows: list) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64).movedim(0, -1)

    solids = solids_of(scenes)
    nothing = Surface("plain", ((0.0,) * 3, (0.0,) * 3), 1.0)
    slots = [
        [scene.solids[slot].surface if slot < len(scene.solids) else nothing for scene in scenes]
        for slot in range(len(solids.shape))
    ]
    paints = [_paint(row) for row in slots]
    lights = [(*scene.lights, scene.lights[0])[:_LIGHTS] for scene in scenes]
    strengths = [[light.strength for light in scene.lights] + [(0.0,) * 3] for scene in scenes]
    return World(
        stacked([scene.camera.position for scene in scenes]),
        stacked([scene.camera.basis for scene in scenes]),
        stacked([(scene.half_width, scene.height, scene.back) for scene in scenes]),
        _paint([scene.floor for scene in scenes]),
        _paint([scene.walls for scene in scenes]),
        Paint(*(torch.stack([getattr(p, name) for p in paints], dim=-2) for name in ("kind", "colours", "period"))),
        stacked([[light.position for light in row] for row in lights]),
        stacked([row[:_LIGHTS] for row in strengths]),
        solids,
    )


def _paint(surfaces: Sequence[Surface]) -> Paint:
    return Paint(
        torch.tensor([TEXTURES.index(surface.texture) for surface in surfaces]),
        torch.tensor([surface.colours for surface in surfaces]).movedim(0, -1),
        torch.tensor([surface.period for surface in surfaces]),
    )


def first_hits(world: World, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Depth along the optical axis in metres, and what is there: a solid's slot or ROOM; both (B, R).

    Args:
        directions: (3, B, R) in the world, from the camera, 1 long along the optical axis.
    """
    dtype = directions.dtype
    walls, _ = _walls(world, directions)
    depth, slot = solid_hits(world.solids.to(dtype), world.origin.to(dtype)[..., None], directions).min(dim=0)
    return torch.minimum(depth, walls), torch.where(depth < walls, slot, ROOM)


def _walls(world: World, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays from the camera meet the room, and which of its sides, (B, R)."""
    half_width, height, back = world.room.to(directions)[..., None]
    x, y, z = world.origin.to(directions)[..., None]
    along_x, along_y, along_z = directions
    gaps = (-y, height - y, back - z, -half_width - x, half_width - x)
    steps = torch.stack(
        [gap / along for gap, along in zip(gaps, (along_y, along_y, along_z, along_x, along_x), strict=True)]
    )
    # A side behind the camera, or one that the ray runs along, is never met.
    return torch.where(steps > 0, steps, float("inf")).min(dim=0)


def seen(world: World, directions: Tensor) -> Tensor:
    """Colours (3, B, R) in [0, 1] that rays from the camera see.

    colour = albedo · (ambient + sum of lights · max(0, n·l)) + gloss · max(0, n·h)^32 on solids, h halfway between the
    light and the eye; a light behind a solid counts nothing.

    Args:
        directions: as in `first_hits`.
    """
    depth, owner = first_hits(world, directions)
    origin, solids = world.origin.to(directions)[..., None], world.solids.to(directions.dtype)
    points = origin + depth * directions
    albedo, normal = _room_surface(world, points, _walls(world, directions)[1])
    scene, ray = (owner != ROOM).nonzero().unbind(1)
    slot = owner[scene, ray]
    albedo[:, scene, ray], normal[:, scene, ray] = _solid_surface(world, solids, points[:, scene, ray], slot, scene)
    eye = -directions[:, scene, ray]
    colour = _AMBIENT * albedo
    for place, strength in zip(world.lights.to(directions), world.strengths.to(directions), strict=True):
        to_light = place[..., None] - points
        length = dot(to_light, to_light).sqrt()
        light = strength[..., None] * _unshadowed(solids, points + _LIFT * normal, to_light, strength)
        colour += albedo * light * (dot(normal, to_light) / length).clamp(min=0.0)
        shine = _gloss(normal[:, scene, ray], eye, (to_light / length)[:, scene, ray])
        colour[:, scene, ray] += _GLOSS * light[:, scene, ray] * shine
    return colour.clamp(0.0, 1.0)


def _unshadowed(solids: Solids, points: Tensor, to_light: Tensor, strength: Tensor) -> Tensor:
    """1 where no solid is between a point and its light, else (and where there is no such light) 0: (B, R)."""
    here = strength.any(dim=0).nonzero()[:, 0]
    lit = torch.zeros_like(points[0])
    if len(here):
        hits = solid_hits(solids.of(here), points[:, here], to_light[:, here], longest=1.0)
        lit[here] = hits.isinf().all(dim=0).to(points)
    return lit


def _gloss(normal: Tensor, eye: Tensor, to_light: Tensor) -> Tensor:
    half = to_light + eye / dot(eye, eye).sqrt()
    shine = (dot(normal, half) / dot(half, half).sqrt()).clamp(min=0.0)
    for _ in range(_SHARPNESS):
        shine = shine * shine
    return shine


def _room_surface(world: World, points: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Albedo and normal, (3, B, R), on the sides of the room."""
    normal = torch.tensor(_INWARD, dtype=points.dtype).T[:, side]
    floor = _textured(world.floor, points[0], torch.zeros_like(side, dtype=points.dtype), points[2], points)
    run = torch.where(side == _BACK, points[0], points[2])
    walls = _textured(world.walls, torch.zeros_like(run), run, torch.zeros_like(run), points)
    ceiling = world.walls.colours[0].to(points)[..., None].expand_as(points)
    albedo = torch.where(side == _FLOOR, floor, torch.where(side == _CEILING, ceiling, walls))
    return albedo, normal


def _textured(paint: Paint, x: Tensor, y: Tensor, z: Tensor, like: Tensor) -> Tensor:
    """Albedo of surfaces (B,) at coordinates (B, R): stripes along y (along x where that is 0), squares along all."""
    period = paint.period.to(like)[:, None]
    cells = [torch.floor(value / period) for value in (x, y, z)]
    stripes = cells[1] if bool(y.any()) else cells[0]
    return _two_coloured(paint.kind[:, None], paint.colours.to(like)[..., None], stripes, sum(cells))


def _two_coloured(kind: Tensor, colours: Tensor, stripes: Tensor, squares: Tensor) -> Tensor:
    number = torch.where(kind == _STRIPES, stripes, torch.where(kind == _CHECKER, squares, 0.0))
    return torch.where(torch.remainder(number, 2.0) == 1.0, colours[1], colours[0])


def _solid_surface(world: World, solids: Solids, points: Tensor, slot: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
    """Albedo and normal, (3, N), at points (3, N) of solids."""
    inside, axes = local(solids, points, slot, scene)
    slope = normals(solids.shape[slot, scene], inside, solids.measures[:, slot, scene])
    normal = axes[0] * slope[0] + axes[1] * slope[1] + axes[2] * slope[2]
    coats = world.coats
    # A little inside and off the middle: no face lies where two squares meet.
    cells = torch.floor((inside - 0.02 * slope) / coats.period[slot, scene].to(points) + 0.37)
    colours = coats.colours[:, :, slot, scene].to(points)
    return _two_coloured(coats.kind[slot, scene], colours, cells[1], cells[0] + cells[1] + cells[2]), normal
