"""What the evidence consists of: stages, which measure on their own and leave JSON, and how a stage is told to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .section import Section

Result = dict[str, Any]
"""What a stage found, JSON values; under "numbers", by name, what another commit is compared by, see `number`."""
SECTIONS = {
    0: "The priors",
    1: "Exactness",
    2: "Cost",
    3: "The paper's claims, at the scale of the tiny prior",
    4: "Open questions",
    5: "Metrics",
}
BETTER = ("smaller", "larger", "")


@dataclass(frozen=True)
class Context:
    """How a stage is to measure.

    Args:
        models: folder with the priors, or to train them in.
        work: folder of what is made on the way; a stage takes a subfolder, see `folder`.
        quick: a small part of everything, on priors that are hardly trained.
        full: full-size networks; needs a GPU.
        device: "cpu" or "cuda".
        seeds: of repeated runs.
        workers: processes side by side.
        threads: of torch in each.
        code: digest of the code, so that what another has left is not taken for its own.
    """

    models: Path
    work: Path
    quick: bool = False
    full: bool = False
    device: str = "cpu"
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 1
    threads: int = 1
    code: str = ""

    @property
    def kind(self) -> str:
        """ "quick", "normal" or "full"."""
        return "quick" if self.quick else "full" if self.full else "normal"

    def folder(self, name: str) -> Path:
        """A stage's own folder, made if need be."""
        path = self.work / self.kind / (self.code or "work") / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def own_models(self) -> Path:
        """A models folder of this code's own in which the priors are linked: it meets no LoRAs and pairs of others."""
        path = self.folder("models")
        link = path / "checkpoints"
        if not link.exists():
            with contextlib.suppress(FileExistsError):  # another stage has made it meanwhile
                link.symlink_to(self.models / "checkpoints", target_is_directory=True)
        return path


def no_settings(context: Context) -> Mapping[str, Any]:
    """Of a stage whose settings are fixed."""
    return {}


def never(context: Context) -> str:
    """No reason to leave a stage out."""
    return ""


@dataclass(frozen=True)
class Stage:
    """One measurement.

    Args:
        name: of its file and for `--only`.
        title: in the report.
        section: of the report, of SECTIONS.
        minutes: about how long it takes, normal and quick.
        run: measures; see `Result`.
        render: what the report shows of a result; reads nothing else.
        settings: what else its result depends on, JSON values: with others it is measured again.
        needs: names of the stages that must be done before.
        alone: nothing runs beside it, because it takes the time.
        seeded: whether it is run for each seed of the context.
        left_out: why it cannot be measured here, "" if it can.
    """

    name: str
    title: str
    section: int
    minutes: tuple[float, float]
    run: Callable[[Context], Result]
    render: Callable[[Result], Section]
    settings: Callable[[Context], Mapping[str, Any]] = field(default=no_settings)
    needs: tuple[str, ...] = ()
    alone: bool = False
    seeded: bool = False
    left_out: Callable[[Context], str] = field(default=never)


def number(
    value: float, better: str, spread: float = 0.0, floor: float = 0.0, seeds: int = 1, timed: bool = False
) -> dict[str, Any]:
    """A number that results of two commits are compared by.

    Args:
        value: measured.
        better: "smaller", "larger", or "" for one that is only shown.
        spread: its standard deviation over the seeds or rounds.
        floor: differences up to this mean nothing, in the number's unit.
        seeds: that it is the mean of.
        timed: seconds or bytes, which are not compared between unlike machines.

    Raises:
        ValueError: another word for better, or a number that is not finite.
    """
    if better not in BETTER:
        raise ValueError(f"better must be 'smaller', 'larger' or '', not {better!r}")
    found = {"value": float(value), "spread": float(spread), "floor": float(floor)}
    if not all(math.isfinite(each) for each in found.values()):
        raise ValueError(f"a number must be finite, not {found}; measure again, or leave it out of 'numbers'")
    return {**found, "better": better, "seeds": seeds, "timed": timed}


def of_seeds(cell: Mapping[str, float], better: str, floor: float = 0.0) -> dict[str, Any]:
    """`number` of a cell of `bench.summary`: mean, deviation, seeds."""
    return number(cell["mean"], better, cell["deviation"], floor, int(cell["seeds"]))
