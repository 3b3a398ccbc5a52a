"""A small network that reads flat shapes in pictures: what is where, in which colour. It never sees a prior's pictures.

It is trained in half a minute on drawings of a seed of its own, of all pairs of shape and colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import shapes
from .shapes import COLOURS, PLACES, SHAPES, Thing

READ = ("shape", "colour", "place")
_SEED, _DRAWN, _STEPS, _BATCH, _RATE = 2_000_000, 2400, 340, 48, 4e-3
_NOISE, _THERE, _WIDTHS = 0.03, 0.5, (1, 3, 5, 7)
_PLACES, _COLOURS = tuple(PLACES), tuple(COLOURS)
_NOTHING = -1


@dataclass(frozen=True)
class Reading:
    """What is read in B pictures, by place (8 of shapes.PLACES).

    Args:
        there: (B, 8), how likely something is there.
        shapes, colours: (B, 8), the likeliest, their numbers in SHAPES and COLOURS.
    """

    there: Tensor
    shapes: Tensor
    colours: Tensor

    def things(self, picture: int, count: int) -> tuple[Thing, ...]:
        """The likeliest things of a picture, in the order of their places.

        Args:
            picture: its number.
            count: how many.
        """
        places = sorted(self.there[picture].topk(count).indices.tolist())
        return tuple(
            Thing(SHAPES[self.shapes[picture, i]], _COLOURS[self.colours[picture, i]], _PLACES[i]) for i in places
        )

    def places(self, picture: int) -> set[str]:
        """Where there is something."""
        return {_PLACES[i] for i in (self.there[picture] > _THERE).nonzero().flatten().tolist()}


class Reader(nn.Module):
    """Logits of presence, shape and colour for every place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(48 * 64, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, len(PLACES) * (1 + len(SHAPES) + len(COLOURS)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, 8), (B, 8, shapes), (B, 8, colours) of pictures (B, 64, 64, 3) in [0, 1]."""
        small = F.avg_pool2d(1.0 - pictures.movedim(-1, 1), 2)
        logits = self.head(self.body(small)).unflatten(1, (len(PLACES), -1))
        there, shape, colour = logits.split((1, len(SHAPES), len(COLOURS)), dim=2)
        return there[..., 0], shape, colour


def read(pictures: Tensor) -> Reading:
    """What is in pictures (B, 64, 64, 3) in [0, 1]."""
    with torch.no_grad():
        there, shape, colour = trained()(pictures.float())
    return Reading(there.sigmoid(), shape.argmax(dim=2), colour.argmax(dim=2))


def judged(pictures: Tensor, asked: Sequence[tuple[Thing, ...]]) -> dict[str, float]:
    """Shares of pictures that show what was asked for.

    "shape", "colour": those of all things are right, the left or upper one first, wherever they are. "place": there is
    something at the places asked for and nowhere else. "all": all of that. "swapped", where two things are asked for:
    the colours are the other way round.

    Args:
        pictures: (B, 64, 64, 3) in [0, 1].
        asked: of each picture; things that are complete.

    Raises:
        ValueError: another number of pictures than of what was asked for, or none.
    """
    if len(pictures) != len(asked) or not asked:
        raise ValueError(
            f"there must be as many pictures as prompts, and one or more, not {len(pictures)}, {len(asked)}"
        )
    reading = read(pictures)
    rows = [_compared(reading, number, things) for number, things in enumerate(asked)]
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def colours(pictures: Tensor) -> list[str]:
    """The colour of the likeliest thing in each of pictures (B, 64, 64, 3) in [0, 1]."""
    reading = read(pictures)
    return [reading.things(number, 1)[0].colour for number in range(len(pictures))]


def _compared(reading: Reading, number: int, asked: tuple[Thing, ...]) -> dict[str, float]:
    found = reading.things(number, len(asked))
    right = {name: [getattr(thing, name) for thing in found] == [getattr(thing, name) for thing in asked]
             for name in ("shape", "colour")}  # fmt: skip
    right["place"] = reading.places(number) == {thing.place for thing in asked}
    right["all"] = all(right.values())
    if len(asked) > 1:
        right["swapped"] = [thing.colour for thing in found] == [thing.colour for thing in reversed(asked)]
    return {name: float(value) for name, value in right.items()}


@lru_cache(maxsize=1)
def trained(seed: int = 0) -> Reader:
    """The network."""
    drawings = [shapes.drawing(index, _SEED, "all") for index in range(_DRAWN)]
    pictures, targets = shapes.rendered(drawings), _targets(drawings)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        network = Reader()
        optimizer = torch.optim.Adam(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
        for _ in range(_STEPS):
            chosen = torch.randint(0, _DRAWN, (_BATCH,))
            loss = _loss(network(_worn(pictures[chosen])), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False).eval()


def _targets(drawings: Sequence[shapes.Drawing]) -> Tensor:
    """Numbers (N, 8, 2) of shape and colour at each place, -1 where there is nothing."""
    targets = torch.full((len(drawings), len(PLACES), 2), _NOTHING)
    for number, each in enumerate(drawings):
        for thing in each.things:
            what = (SHAPES.index(thing.shape), _COLOURS.index(thing.colour))
            targets[number, _PLACES.index(thing.place)] = torch.tensor(what)
    return targets


def _loss(logits: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    there, shape, colour = logits
    something = targets[..., 0] != _NOTHING
    named = [F.cross_entropy(given[something], targets[..., i][something]) for i, given in enumerate((shape, colour))]
    return F.binary_cross_entropy_with_logits(there, something.float()) * len(PLACES) + sum(named)


def _worn(pictures: Tensor) -> Tensor:
    """Pictures, blurred by one of several widths (a batch's quarter each), and noisy: a prior's are soft, too."""
    parts = [_blurred(part, width) for part, width in zip(pictures.chunk(len(_WIDTHS)), _WIDTHS, strict=True)]
    return torch.cat(parts) + _NOISE * torch.randn(pictures.shape)


def _blurred(pictures: Tensor, width: int) -> Tensor:
    """By the mean of squares of a width in pixels, twice."""
    planes = pictures.movedim(-1, 1)
    for _ in range(2):
        planes = F.avg_pool2d(F.pad(planes, (width // 2,) * 4, mode="replicate"), width, stride=1)
    return planes.movedim(1, -1)
