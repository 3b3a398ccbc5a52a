"""Where rays meet a scene: walls in closed form, solids by marching along their signed distance.

Vectors are stored component first, (3, N) or (3, B, R): B scenes, R rays of each. Only rays that meet a solid's
bounding sphere are marched. Everything is element by element, so that a scene does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .scene_plan import SHAPES, Scene

MOST = 3
"""Solids in a scene."""
ROOM = -1
_STEPS = {torch.float64: 400, torch.float32: 80}
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
_CLOSE, _STRETCH = 2e-3, 20.0
_CONVEX = ("sphere", "box", "cylinder", "cone")


@dataclass(frozen=True)
class Solids:
    """The solids of B scenes.

    Args:
        shape: (MOST, B), index in SHAPES; -1: none.
        centre: (3, MOST, B).
        basis: (3, 3, MOST, B); basis[i] is the direction of the solid's own axis i.
        measures: (3, MOST, B).
        radius: (MOST, B), of the bounding sphere; 0: none.
    """

    shape: Tensor
    centre: Tensor
    basis: Tensor
    measures: Tensor
    radius: Tensor

    def to(self, dtype: torch.dtype) -> Solids:
        """With all but the shapes in another floating point format."""
        return Solids(self.shape, *(x.to(dtype) for x in (self.centre, self.basis, self.measures, self.radius)))

    def of(self, scenes: Tensor) -> Solids:
        """Those of some scenes."""
        return Solids(*(x[..., scenes] for x in (self.shape, self.centre, self.basis, self.measures, self.radius)))


def solids_of(scenes: Sequence[Scene]) -> Solids:
    """The solids as tensors, float64."""
    shape = torch.full((MOST, len(scenes)), -1)
    numbers = torch.zeros(16, MOST, len(scenes), dtype=torch.float64)
    for i, scene in enumerate(scenes):
        for slot, solid in enumerate(scene.solids):
            shape[slot, i] = SHAPES.index(solid.shape)
            axes = [value for axis in solid.basis for value in axis]
            row = [*solid.centre, *axes, *solid.measures, solid.radius]
            numbers[:, slot, i] = torch.tensor(row, dtype=torch.float64)
    return Solids(shape, numbers[:3], numbers[3:12].unflatten(0, (3, 3)), numbers[12:15], numbers[15])


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a[i]·b[i] over the three components."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def distance(shape: str, p: Tensor, measures: Tensor) -> Tensor:
    """Signed distance (N,) in metres of points (3, N), in the solid's own axes, to its surface; negative inside.

    Args:
        shape: of SHAPES.
        measures: (3, N), as in `Solid`.

    Raises:
        ValueError: another shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"the shape {shape!r} is none of {', '.join(SHAPES)}")
    if shape == "sphere":
        return dot(p, p).sqrt() - measures[0]
    if shape == "box":
        q = p.abs() - measures
        outside = q.clamp(min=0.0)
        return dot(outside, outside).sqrt() + torch.maximum(torch.maximum(q[0], q[1]), q[2]).clamp(max=0.0)
    across = (p[0] * p[0] + p[2] * p[2]).sqrt()
    if shape == "torus":
        return _length(across - measures[0], p[1]) - measures[1]
    if shape == "cylinder":
        x, y = across - measures[0], p[1].abs() - measures[1]
        return _length(x.clamp(min=0.0), y.clamp(min=0.0)) + torch.maximum(x, y).clamp(max=0.0)
    return _cone(across, p[1], measures[0], measures[1])


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _cone(across: Tensor, y: Tensor, radius: Tensor, half: Tensor) -> Tensor:
    """The profile is a triangle: a base from (0, -half) to (radius, -half), a slope from there to (0, half)."""
    base_x = across - torch.minimum(across, radius)
    base_y = y + half
    along = (2 * half * base_y - radius * (across - radius)) / (4 * half * half + radius * radius)
    along = along.clamp(0.0, 1.0)
    slope_x, slope_y = across - radius * (1 - along), base_y - 2 * half * along
    squared = torch.minimum(base_x * base_x + base_y * base_y, slope_x * slope_x + slope_y * slope_y)
    inside = (base_y > 0) & (2 * half * (across - radius) + radius * base_y < 0)
    return torch.where(inside, -1.0, 1.0) * squared.sqrt()


@dataclass(frozen=True)
class Candidates:
    """N rays that meet a solid's bounding sphere.

    Args:
        slot, scene, ray: (N,), which solid of which scene, which ray.
        start, direction: (3, N), in the solid's own axes, the start counted from its centre.
        first, last: (N,), where the ray enters and leaves the bounding sphere, in its own lengths.
    """

    slot: Tensor
    scene: Tensor
    ray: Tensor
    start: Tensor
    direction: Tensor
    first: Tensor
    last: Tensor


def solid_hits(solids: Solids, origin: Tensor, direction: Tensor, longest: float = float("inf")) -> Tensor:
    """Where rays first meet each solid, (MOST, B, R), in lengths of their directions; inf: they do not.

    Args:
        origin: (3, B, R) or (3, B, 1).
        direction: (3, B, R), of any length.
        longest: how far a ray reaches.
    """
    found = direction.new_full((MOST, *direction.shape[1:]), float("inf"))
    parts = [_candidates(solids, slot, origin, direction, longest) for slot in range(MOST)]
    fields = ("slot", "scene", "ray", "start", "direction", "first", "last")
    every = Candidates(*(torch.cat([getattr(part, name) for part in parts], dim=-1) for name in fields))
    shapes = solids.shape[every.slot, every.scene]
    for number, shape in enumerate(SHAPES):
        chosen = (shapes == number).nonzero()[:, 0]
        mine = Candidates(*(getattr(every, name)[..., chosen] for name in fields))
        measures = solids.measures[:, mine.slot, mine.scene]
        found[mine.slot, mine.scene, mine.ray] = _marched(shape, measures, mine)
    return found


def _candidates(solids: Solids, slot: int, origin: Tensor, direction: Tensor, longest: float) -> Candidates:
    """The bounding sphere |start + t direction| = radius is a quadratic in t."""
    here = (solids.shape[slot] >= 0).nonzero()[:, 0]
    if len(here) < len(solids.shape[slot]):
        origin, direction = origin[:, here], direction[:, here]
    start = origin - solids.centre[:, slot, here, None]
    squared, middle = dot(direction, direction), dot(start, direction)
    under = middle * middle - squared * (dot(start, start) - solids.radius[slot, here, None] ** 2)
    scene, ray = (under > 0).nonzero().unbind(1)
    root, squared, middle = under[scene, ray].sqrt(), squared[scene, ray], middle[scene, ray]
    first, last = ((-middle - root) / squared).clamp(min=0.0), ((-middle + root) / squared).clamp(max=longest)
    kept = (first < last).nonzero()[:, 0]
    scene, ray = scene[kept], ray[kept]
    start, direction = start.expand_as(direction)[:, scene, ray], direction[:, scene, ray]
    scene = here[scene]
    axes = solids.basis[:, :, slot, scene]
    start, direction = (torch.stack([dot(axis, vector) for axis in axes]) for vector in (start, direction))
    return Candidates(torch.full_like(scene, slot), scene, ray, start, direction, first[kept], last[kept])


def _marched(shape: str, measures: Tensor, rays: Candidates) -> Tensor:
    """Where rays meet a solid, (N,); inf: they do not. Rays that have ended are left out from step to step.

    A step as long as the distance is safe. The distance to a convex solid is convex along a ray: so the line through
    its last two values falls to zero before the solid begins, a step up to there is safe as well, and a ray that once
    goes away does not come back. Close to a torus it is so nearly enough, for steps of a fraction of its tube.
    """
    found = torch.full_like(rays.first, float("inf"))
    speed = dot(rays.direction, rays.direction).sqrt()
    inputs = torch.cat([rays.start, rays.direction, measures, torch.stack([rays.last, speed])])
    t, which, tolerance = rays.first, torch.arange(len(found)), _TOLERANCE[found.dtype]
    before = step = None
    for _ in range(_STEPS[found.dtype]):
        gap = distance(shape, inputs[:3] + t * inputs[3:6], inputs[6:9])
        hit, going = gap < tolerance, t < inputs[9]
        found[which[hit & going]] = t[hit & going]
        going &= ~hit
        safe = gap / inputs[10]
        if before is not None:
            straight = gap * step / torch.where(gap < before, before - gap, float("inf"))
            if shape in _CONVEX:
                going &= gap < before
            else:
                straight = torch.where(gap < _CLOSE * inputs[7], straight.clamp(max=_STRETCH * safe), 0.0)
            safe = torch.maximum(safe, straight)
        kept = going.nonzero()[:, 0]
        if not len(kept):
            break
        inputs, which, before, step = inputs[:, kept], which[kept], gap[kept], safe[kept]
        t = t[kept] + step
    return found


def local(solids: Solids, points: Tensor, slot: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
    """Points (3, N) of the world in their solids' own axes, and those axes (3, 3, N)."""
    axes = solids.basis[:, :, slot, scene]
    offset = points - solids.centre[:, slot, scene]
    return torch.stack([dot(axis, offset) for axis in axes]), axes


def normals(shapes: Tensor, points: Tensor, measures: Tensor, reach: float = 2e-3) -> Tensor:
    """Unit normals (3, N) at points of solids in their own axes: differences of the distance.

    Args:
        shapes: (N,), index in SHAPES.
        reach: metres to either side.
    """
    slope = torch.zeros_like(points)
    for number, shape in enumerate(SHAPES):
        chosen = (shapes == number).nonzero()[:, 0]
        p, size = points[:, chosen], measures[:, chosen]
        slope[:, chosen] = _slope(lambda q, shape=shape, size=size: distance(shape, q, size), p, reach)
    return slope / dot(slope, slope).sqrt().clamp(min=1e-12)


def _slope(field: Callable[[Tensor], Tensor], p: Tensor, reach: float) -> Tensor:
    sides = torch.eye(3, dtype=p.dtype)[:, :, None] * reach
    return torch.stack([field(p + side) - field(p - side) for side in sides])
