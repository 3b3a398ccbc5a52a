"""What stands where in a synthetic scene: a closed room, its lights, a camera, one to three solids, and a true caption.

World coordinates are metres: x to the right, y up from the floor, z away from the camera, which stands at z = 0.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace
from itertools import permutations
from random import Random

SHAPES = ("sphere", "box", "cylinder", "cone", "torus")
COLOURS = {
    "red": (0.86, 0.10, 0.10),
    "orange": (1.00, 0.50, 0.04),
    "yellow": (0.98, 0.88, 0.12),
    "green": (0.12, 0.62, 0.16),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.12, 0.22, 0.85),
    "purple": (0.55, 0.15, 0.70),
    "white": (0.97, 0.97, 0.97),
}
TEXTURES = ("plain", "stripes", "checker")
HALF_WIDTH = 0.5
"""Half the picture's width (and height) at distance 1: the tangent of half the angle of view, 26.6 degrees."""
_SOLIDS = (1, 1, 1, 1, 1, 2, 2, 2, 2, 3)
_SMALLEST, _LARGEST = 0.3, (0.0, 0.65, 0.5, 0.42)
_TRIES = 60
_APART, _BESIDE, _DEEPER = 0.8, 0.05, 0.3

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Surface:
    """How floor, walls or a solid are painted.

    Args:
        texture: of TEXTURES.
        colours: two colours, red, green, blue in [0, 1]; plain ones show the first.
        period: width of a stripe or square, metres.
    """

    texture: str
    colours: tuple[Vector, Vector]
    period: float


@dataclass(frozen=True)
class Solid:
    """One solid.

    Args:
        shape: of SHAPES.
        colour: a name of COLOURS.
        centre: metres.
        measures: sphere: radius; box: half its sides; cylinder and cone: radius and half the height (along its own
            y); torus: radius of the ring (around its own y) and of the tube. Metres, rest 0.
        turn: angle around the vertical, radians.
        lying: whether its own y points sideways; it is turned after that.
        surface: how it is painted.
    """

    shape: str
    colour: str
    centre: Vector
    measures: Vector
    turn: float
    lying: bool
    surface: Surface

    @property
    def name(self) -> str:
        """ "a red sphere"."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"

    @property
    def radius(self) -> float:
        """Of the smallest sphere around its centre that holds it, metres."""
        a, b, _ = self.measures
        if self.shape == "torus":
            return a + b
        return math.hypot(*self.measures) if self.shape != "sphere" else a

    @property
    def basis(self) -> tuple[Vector, Vector, Vector]:
        """The directions of its own x, y and z in the world."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        x, up, z = (c, 0.0, -s), (0.0, 1.0, 0.0), (s, 0.0, c)
        return (x, z, (0.0, -1.0, 0.0)) if self.lying else (x, up, z)


@dataclass(frozen=True)
class Camera:
    """Position in metres; yaw to the right and pitch downwards in radians."""

    position: Vector
    yaw: float
    pitch: float

    @property
    def basis(self) -> tuple[Vector, Vector, Vector]:
        """The directions of the picture's right and up, and of the optical axis, in the world."""
        cy, sy, cp, sp = math.cos(self.yaw), math.sin(self.yaw), math.cos(self.pitch), math.sin(self.pitch)
        return (cy, 0.0, -sy), (sy * sp, cp, cy * sp), (sy * cp, -sp, cy * cp)

    def seen(self, point: Vector) -> Vector:
        """Where a point is in the picture, right and up in [-1, 1], and its depth in metres."""
        offset = [a - b for a, b in zip(point, self.position, strict=True)]
        right, up, depth = (sum(a * b for a, b in zip(offset, axis, strict=True)) for axis in self.basis)
        return right / (depth * HALF_WIDTH), up / (depth * HALF_WIDTH), depth


@dataclass(frozen=True)
class Light:
    """A point that shines; strength is what it adds to a white surface that faces it."""

    position: Vector
    strength: Vector


@dataclass(frozen=True)
class Scene:
    """All that a picture shows.

    Args:
        half_width: of the room, which spans x = -half_width to half_width, metres.
        height, back: of the ceiling and of the back wall, metres.
        floor, walls: how they are painted; the ceiling is as the walls' first colour.
        lights: one or two.
        solids: one to three of different colours.
        relation: (i, word, j) if solid i is unmistakably "left of", "right of", "in front of" or "behind" solid j.
        caption: true sentence about all the solids.
    """

    camera: Camera
    half_width: float
    height: float
    back: float
    floor: Surface
    walls: Surface
    lights: tuple[Light, ...]
    solids: tuple[Solid, ...]
    relation: tuple[int, str, int] | None = None
    caption: str = ""


def plan(index: int, seed: int) -> Scene:
    """The scene of an index; the same one on every machine."""
    random = Random(f"diff2flow scene {seed}/{index}")
    while True:
        empty = _room(random)
        solids = _solids(random, empty)
        if solids is not None:
            break
    scene = replace(empty, solids=solids)
    found = relations(scene)
    scene = replace(scene, relation=random.choice(found) if found else None)
    return replace(scene, caption=caption(scene))


def caption(scene: Scene) -> str:
    """ "a red sphere", "a red sphere left of a blue box", "a red sphere left of a blue box, and a green cone"."""
    names = [solid.name for solid in scene.solids]
    if scene.relation is None:
        return listing(scene)
    i, word, j = scene.relation
    others = [f", and {name}" for k, name in enumerate(names) if k not in (i, j)]
    return f"{names[i]} {word} {names[j]}" + "".join(others)


def listing(scene: Scene) -> str:
    """ "a red sphere, a green cone and a blue box": true however they stand."""
    names = [solid.name for solid in scene.solids]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def relations(scene: Scene) -> list[tuple[int, str, int]]:
    """(i, word, j) for all pairs that stand unmistakably so.

    "left of": in the picture, solid i's disc ends left of where solid j's begins. "in front of": solid i's bounding
    sphere ends 0.3 m before solid j's begins, along the optical axis.
    """
    found = []
    for i, j in permutations(range(len(scene.solids)), 2):
        (right_i, _, depth_i), disc_i = _disc(scene.camera, scene.solids[i])
        (right_j, _, depth_j), disc_j = _disc(scene.camera, scene.solids[j])
        if right_j - right_i > disc_i + disc_j + _BESIDE:
            found += [(i, "left of", j), (j, "right of", i)]
        if depth_j - depth_i > scene.solids[i].radius + scene.solids[j].radius + _DEEPER:
            found += [(i, "in front of", j), (j, "behind", i)]
    return found


def is_clear(scene: Scene) -> bool:
    """Whether the solids stand in the room, apart, in the picture, and none is mostly behind another."""
    solids = scene.solids
    return all(
        _is_inside(scene, solid) and all(_are_apart(scene.camera, solid, other) for other in solids[:i])
        for i, solid in enumerate(solids)
    )


def _disc(camera: Camera, solid: Solid) -> tuple[Vector, float]:
    """Where the centre is seen, and the radius of the solid's disc in the picture."""
    where = camera.seen(solid.centre)
    return where, solid.radius / (where[2] * HALF_WIDTH)


def _is_inside(scene: Scene, solid: Solid) -> bool:
    (right, up, depth), disc = _disc(scene.camera, solid)
    x, _, z = solid.centre
    room = abs(x) + solid.radius < scene.half_width and z + solid.radius < scene.back
    return room and depth - solid.radius > 0.9 and abs(right) + 0.9 * disc < 1.0 and abs(up) + 0.9 * disc < 1.0


def _are_apart(camera: Camera, one: Solid, other: Solid) -> bool:
    (right, up, _), disc = _disc(camera, one)
    (right_other, up_other, _), disc_other = _disc(camera, other)
    apart = math.hypot(right - right_other, up - up_other) > _APART * (disc + disc_other)
    return apart and math.dist(one.centre, other.centre) > one.radius + other.radius


def _room(random: Random) -> Scene:
    half_width, height, back = random.uniform(2.4, 3.8), random.uniform(2.7, 3.6), random.uniform(5.0, 7.8)
    camera = Camera(
        (random.uniform(-0.5, 0.5), random.uniform(0.9, 1.6), 0.0),
        yaw=random.uniform(-0.12, 0.12),
        pitch=random.uniform(0.08, 0.28),
    )
    count = random.choice((1, 2))
    lights = tuple(
        Light(
            (random.uniform(-0.8, 0.8) * half_width, height - 0.2, random.uniform(0.2, 0.6) * back),
            _tinted(random, 0.75 / count),
        )
        for _ in range(count)
    )
    floor = _painted(random, random.choice(("checker", "checker", "stripes", "plain")), 0.35)
    walls = _painted(random, random.choice(("plain", "plain", "stripes")), 0.12)
    return Scene(camera, half_width, height, back, floor, walls, lights, ())


def _tinted(random: Random, strength: float) -> Vector:
    warm = random.uniform(-0.06, 0.06)
    return (strength * (1 + warm), strength, strength * (1 - warm))


def _painted(random: Random, texture: str, contrast: float) -> Surface:
    """Muted colours, so that the solids stand out."""
    hue, saturation, value = random.random(), random.uniform(0.0, 0.35), random.uniform(0.45, 0.9)
    first = colorsys.hsv_to_rgb(hue, saturation, value)
    second = colorsys.hsv_to_rgb((hue + random.uniform(-0.1, 0.1)) % 1.0, saturation, value - contrast)
    return Surface(texture, (first, second), random.uniform(0.5, 1.0))


def _solids(random: Random, empty: Scene) -> tuple[Solid, ...] | None:
    """One to three solids of different colours that stand clear; None if chance has left no place for one."""
    count = random.choice(_SOLIDS)
    solids: tuple[Solid, ...] = ()
    for colour in random.sample(sorted(COLOURS), count):
        for _ in range(_TRIES):
            solid = _standing(random, empty.camera, colour, empty.back, _LARGEST[count])
            if is_clear(replace(empty, solids=(*solids, solid))):
                solids = (*solids, solid)
                break
        else:
            return None
    return solids


def _standing(random: Random, camera: Camera, colour: str, back: float, largest: float) -> Solid:
    """A solid on the floor, somewhere before the camera; how large it looks tells nothing about its distance.

    Args:
        largest: greatest size, half the picture being 1; about the radius of its disc.
    """
    shape = random.choice(SHAPES)
    distance = math.exp(random.uniform(math.log(1.5), math.log(back - 0.5)))
    size = min(distance * HALF_WIDTH * random.uniform(_SMALLEST, largest), 1.4)
    sideways = random.uniform(-0.8, 0.8) * distance * HALF_WIDTH
    lying = random.random() < {"torus": 0.6, "cylinder": 0.3}.get(shape, 0.0)
    # A torus that stands on its rim shows its hole.
    turn = random.uniform(-0.8, 0.8) + camera.yaw if shape == "torus" else random.uniform(-math.pi, math.pi)
    measures = _measures(random, shape, size)
    (right, _, _), _, (ahead, _, forward) = camera.basis
    x = camera.position[0] + sideways * right + distance * ahead
    z = camera.position[2] + sideways * camera.basis[0][2] + distance * forward
    centre = (x, _elevation(shape, measures, lying), z)
    return Solid(shape, colour, centre, measures, turn, lying, _coat(random, colour, size))


def _measures(random: Random, shape: str, size: float) -> Vector:
    def about(low: float, high: float) -> float:
        return size * random.uniform(low, high)

    if shape == "sphere":
        return (about(0.8, 0.9), 0.0, 0.0)
    if shape == "box":
        return (about(0.5, 0.75), about(0.5, 0.75), about(0.5, 0.75))
    if shape == "torus":
        return (about(0.66, 0.72), about(0.22, 0.3), 0.0)
    return (about(0.5, 0.65), about(0.6, 0.8), 0.0) if shape == "cylinder" else (about(0.65, 0.8), about(0.7, 0.9), 0.0)


def _elevation(shape: str, measures: Vector, lying: bool) -> float:
    """Height of the centre of a solid that stands on the floor."""
    a, b, _ = measures
    if shape == "torus":
        return a + b if lying else b
    return a if shape == "sphere" or lying else b


def _coat(random: Random, colour: str, size: float) -> Surface:
    first = COLOURS[colour]
    second = (0.62, 0.62, 0.66) if colour == "white" else tuple(c + 0.6 * (1.0 - c) for c in first)
    texture = random.choice(("plain", "plain", "plain", "stripes", "checker"))
    return Surface(texture, (first, second), size * random.uniform(0.3, 0.45))
