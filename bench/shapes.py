"""Flat coloured shapes with captions made of parts: what, in which colour, and where; one or two in a picture.

    python -m diff2flow_nodes.bench.shapes --out FOLDER --count 200 --seed 0

writes 0000.png with a caption 0000.txt beside it, such as "a red circle at the top left" or "a red circle left of a
blue square". A few pairs of shape and colour are held out: no prior is trained on them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from .scene_plan import COLOURS as SOLID_COLOURS
from .scenes import write_picture

SIZE = 64
SHAPES = ("circle", "square", "triangle", "bar")
COLOURS = {name: SOLID_COLOURS[name] for name in ("red", "yellow", "green", "blue", "purple")}
COLOURS["black"] = (0.06, 0.06, 0.06)
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PLACES = {
    **dict(zip(CORNERS, product((17.0, 47.0), repeat=2), strict=True)),
    "left": (32.0, 17.0), "right": (32.0, 47.0), "top": (17.0, 32.0), "bottom": (47.0, 32.0),
}  # fmt: skip
"""Centres, down and right, in pixels."""
RELATIONS = {"left of": ("left", "right"), "above": ("top", "bottom")}
"""Of two shapes, and where each of them is."""
HELD_OUT = (("circle", "green"), ("square", "yellow"), ("triangle", "red"), ("bar", "blue"))
"""Pairs of shape and colour that no prior is trained on; each shape and colour is met in others."""
PARTS = ("trained", "all")
_PAIRS = 200
_MOST = 10_000
_MOVED, _HALF, _FLAT = 2.0, (11.0, 13.0), 0.4
_PAPER, _SHADE = (0.95, 1.0), 0.05


@dataclass(frozen=True)
class Thing:
    """A shape of a colour at a place; "" for what is not said.

    Args:
        shape: of SHAPES.
        colour: of COLOURS.
        place: of PLACES.
    """

    shape: str = ""
    colour: str = ""
    place: str = ""

    @property
    def kind(self) -> tuple[str, str]:
        """Shape and colour."""
        return self.shape, self.colour


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for.

    Args:
        text: the caption.
        things: one, or two: the left or upper one first.
    """

    text: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Drawing:
    """All that is known of a picture.

    Args:
        prompt: its caption; may say less than there is.
        things: all of it.
        centres: of each, down and right, pixels.
        halves: half of each one's width, pixels.
        shades: what is added to each one's colour, red, green, blue.
        paper: grey of the background, in [0, 1].
    """

    prompt: Prompt
    things: tuple[Thing, ...]
    centres: tuple[tuple[float, float], ...]
    halves: tuple[float, ...]
    shades: tuple[tuple[float, ...], ...]
    paper: float


def single(shape: str, colour: str, corner: str) -> Prompt:
    """ "a red circle at the top left"; without a shape "something red", without a colour "a circle at the top left".

    Raises:
        ValueError: an unknown shape, colour or corner.
    """
    _require(shape, ("", *SHAPES), "shape")
    _require(colour, ("", *COLOURS), "colour")
    _require(corner, CORNERS if shape else ("",), "corner")
    if not shape:
        return Prompt(f"something {colour}", (Thing(colour=colour),))
    name = " ".join(word for word in ("a", colour, shape) if word)
    return Prompt(f"{name} at the {corner}", (Thing(shape, colour, corner),))


def pair(first: tuple[str, str], second: tuple[str, str], relation: str) -> Prompt:
    """ "a red circle left of a blue square".

    Args:
        first, second: shape and colour.
        relation: of RELATIONS.

    Raises:
        ValueError: an unknown relation, shape or colour.
    """
    _require(relation, RELATIONS, "relation")
    for shape, colour in (first, second):
        _require(shape, SHAPES, "shape")
        _require(colour, COLOURS, "colour")
    things = tuple(Thing(*kind, place) for kind, place in zip((first, second), RELATIONS[relation], strict=True))
    names = (f"a {colour} {shape}" for shape, colour in (first, second))
    return Prompt(f" {relation} ".join(names), things)


def kinds(part: str) -> list[tuple[str, str]]:
    """Pairs of shape and colour: those a prior is trained on, or all.

    Raises:
        ValueError: not one of PARTS.
    """
    _require(part, PARTS, "part")
    return [kind for kind in product(SHAPES, COLOURS) if part == "all" or kind not in HELD_OUT]


@lru_cache(maxsize=2)
def pairs(part: str) -> tuple[Prompt, ...]:
    """Two shapes beside each other that differ in shape and colour: the 200 a prior is trained on, or all."""
    found = [
        pair(first, second, relation)
        for first, second, relation in product(kinds(part), kinds(part), RELATIONS)
        if first[0] != second[0] and first[1] != second[1]
    ]
    return tuple(found) if part == "all" else tuple(Random("diff2flow pairs").sample(found, _PAIRS))


def drawing(index: int, seed: int, part: str = "trained") -> Drawing:
    """What a picture shows; it depends on nothing but these.

    Half of the pictures show two shapes. Of the others a few captions leave out the colour, or all but the colour.

    Args:
        index: 0 and up.
        seed: another seed, other pictures.
        part: of PARTS.
    """
    random = Random(f"diff2flow shapes {seed}/{index}/{part}")
    if random.random() < 0.5:
        prompt = random.choice(pairs(part))
        return placed(prompt, prompt.things, random)
    (shape, colour), corner, said = random.choice(kinds(part)), random.choice(CORNERS), random.random()
    full = single(shape, colour, corner)
    short = single("", colour, "") if said < 0.08 else single(shape, "", corner)
    return placed(short if said < 0.2 else full, full.things, random)


def placed(prompt: Prompt, things: tuple[Thing, ...], random: Random) -> Drawing:
    """Things a little moved, larger or smaller, and of slightly other colours.

    Args:
        prompt: the caption.
        things: complete ones.
        random: drawn from.
    """
    centres = tuple(
        (down + random.uniform(-_MOVED, _MOVED), right + random.uniform(-_MOVED, _MOVED))
        for down, right in (PLACES[thing.place] for thing in things)
    )
    halves = tuple(random.uniform(*_HALF) for _ in things)
    shades = tuple(tuple(random.uniform(-_SHADE, _SHADE) for _ in range(3)) for _ in things)
    return Drawing(prompt, things, centres, halves, shades, random.uniform(*_PAPER))


def rendered(drawings: Sequence[Drawing]) -> Tensor:
    """Pictures (B, 64, 64, 3) in [0, 1], float32; edges are as wide as a pixel."""
    paper = torch.tensor([each.paper for each in drawings]).reshape(-1, 1, 1, 1)
    pictures = paper.expand(-1, SIZE, SIZE, 3).clone()
    flat = [(number, *of) for number, each in enumerate(drawings) for of in _parts(each)]
    owners, things, centres, halves, shades = (list(values) for values in zip(*flat, strict=True))
    cover = _coverage([thing.shape for thing in things], torch.tensor(centres), torch.tensor(halves))
    colours = torch.tensor([COLOURS[thing.colour] for thing in things]) + torch.tensor(shades)
    change = cover[..., None] * (colours[:, None, None] - paper[owners])
    return pictures.index_add_(0, torch.tensor(owners), change).clamp(0.0, 1.0)


def _parts(each: Drawing) -> list[tuple]:
    return list(zip(each.things, each.centres, each.halves, each.shades, strict=True))


def _coverage(names: Sequence[str], centres: Tensor, halves: Tensor) -> Tensor:
    """How much of each pixel a shape covers (N, 64, 64), from the distance to its edge, pixels, negative inside."""
    place = torch.arange(SIZE) + 0.5
    down = place[:, None] - centres[:, 0].reshape(-1, 1, 1)
    right = (place[None, :] - centres[:, 1].reshape(-1, 1, 1)).abs()
    half = halves.reshape(-1, 1, 1)
    high = down.abs()
    # The triangle's sides fall by 2 for each step to the right, from the top in the middle.
    distances = {
        "circle": torch.hypot(down, right) - half,
        "square": torch.maximum(high, right) - 0.92 * half,
        "triangle": torch.maximum(down - half, (2.0 * right - down - half) / 5.0**0.5),
        "bar": torch.maximum(high - _FLAT * half, right - half),
    }
    every = torch.stack([distances[name] for name in SHAPES])
    chosen = torch.tensor([SHAPES.index(name) for name in names])
    return (0.5 - every[chosen, torch.arange(len(names))]).clamp(0.0, 1.0)


def write(folder: Path, count: int, seed: int, part: str = "trained") -> list[Path]:
    """Writes the first pictures of a seed with their captions; returns the pictures' paths.

    Args:
        folder: for 0000.png, 0000.txt and so on.
        count: 1 to 10000.
        seed, part: see `drawing`.

    Raises:
        ValueError: a count out of range, or another part.
    """
    if not 1 <= count <= _MOST:
        raise ValueError(f"count must be 1 to {_MOST}, not {count}")
    drawings = [drawing(index, seed, part) for index in range(count)]
    return [
        write_picture(Path(folder) / f"{number:04d}.png", rendered([each])[0], each.prompt.text)
        for number, each in enumerate(drawings)
    ]


def _require(given: str, known: Sequence[str] | dict[str, object], what: str) -> None:
    if given not in known:
        raise ValueError(f"the {what} {given!r} is none of {', '.join(repr(name) for name in known)}")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m diff2flow_nodes.bench.shapes", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write PNG and .txt files to")
    parser.add_argument("--count", type=int, default=200, help="how many pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default %(default)s)")
    parser.add_argument(
        "--part", choices=PARTS, default="trained", help="'all': held-out pairs of shape and colour, too"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths = write(options.out, options.count, options.seed, options.part)
    logging.info("%d pictures with captions in %s", len(paths), options.out)


if __name__ == "__main__":
    main()
