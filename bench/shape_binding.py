"""Whether samples show what a caption asks for, part by part: shape, colour and place of one or two things.

Measured on the prior of flat shapes, at several CFG scales, at few steps before and after reflow, on captions that the
prior was trained with and on others, and with a negative prompt that names a colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole
from ..nodes import NODE_CLASS_MAPPINGS
from . import digits, shape_reader, shapes, tiny_prior
from .loaded_prior import OnPrior
from .reflow_quality import STUDENTS, reflowed
from .runs import run_name
from .scene_prior import HELD_OUT_SEED
from .shapes import CORNERS, HELD_OUT, Prompt

GROUPS = ("one", "two", "one, held out", "two, new")
"""Captions: of the prior's training with one thing and with two; of shapes in colours that were held out; of two things
whose caption was not trained, though both were met in others."""
TOGETHER = {"trained": GROUPS[:2], "new": GROUPS[2:]}
"""Means of groups."""
BASE, REFLOW = "base", "reflow"
_SHOWN = 6


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        prior: quality of the tiny prior.
        captions: of each of GROUPS; a sample of each is drawn for each seed.
        cfgs: at which the base is sampled, in `steps` Euler steps.
        steps: of the base and of the pairs.
        few: step counts at which base and reflow are compared.
        guided: CFG of the pairs, and of the base at few steps; reflow takes 1.
        taught: captions that the pairs are made of, half of them of two things.
        pairs: that reflow is trained on.
        training, batch_size, learning_rate, rank: of that training.
        negatives: samples with a negative prompt, each drawn three times.
        negative_cfg: of these after reflow; the base takes `guided`.
        real: pictures that the reader is judged by.
    """

    prior: str = "shapes"
    captions: int = 16
    cfgs: tuple[float, ...] = (1.0, 3.0, 5.0)
    steps: int = 25
    few: tuple[int, ...] = (4, 2, 1)
    guided: float = tiny_prior.CFG
    taught: int = 80
    pairs: int = 480
    training: int = 150
    batch_size: int = 32
    learning_rate: float = 1e-3
    rank: int = 16
    negatives: int = 16
    negative_cfg: float = 2.0
    real: int = 200


def prompts(group: str, count: int) -> list[Prompt]:
    """Some captions of a group, always the same.

    Args:
        group: of GROUPS.
        count: how many; repeated where there are fewer.

    Raises:
        ValueError: another group.
    """
    if group not in GROUPS:
        raise ValueError(f"the group {group!r} is none of {', '.join(GROUPS)}")
    trained = shapes.kinds("trained")
    if group == "two":
        found = list(shapes.pairs("trained"))
    elif group == "two, new":
        known = set(shapes.pairs("trained"))
        found = [each for each in shapes.pairs("all") if each not in known and _kinds(each) <= set(trained)]
    else:
        kinds = trained if group == "one" else HELD_OUT
        found = [shapes.single(*kind, corner) for kind, corner in product(kinds, CORNERS)]
    random = Random(f"diff2flow binding {group}")
    shuffled = random.sample(found, len(found))
    return [shuffled[i % len(shuffled)] for i in range(count)]


def _kinds(prompt: Prompt) -> set[tuple[str, str]]:
    return {thing.kind for thing in prompt.things}


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the numbers that all have."""
    return {name: fmean(each[name] for each in found) for name in found[0] if all(name in each for each in found)}


class Bench(OnPrior):
    """Everything that the runs have in common, loaded once; see `OnPrior`."""

    def __init__(self, models: Path, work: Path, setting: Setting, device: str = "cpu") -> None:
        super().__init__(models, work, setting, device)
        self._asked = [each for group in GROUPS for each in prompts(group, setting.captions)]
        self._positive = self._encoded([each.text for each in self._asked])
        self._empty = self._encoded([""])

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """What samples show.

        Args:
            method: BASE or REFLOW, for which a LoRA is trained.
            seed: of the noise and of the training.
        """
        setting, guidance, parts, rows = self.setting, {}, {}, []
        model = self._model if method == BASE else self._student(seed)
        if method == BASE:
            for cfg in setting.cfgs:
                guidance[f"{cfg:g}"] = self._judged(model, setting.steps, cfg, seed, rows)
        cfg = setting.guided if method == BASE else 1.0
        for steps in setting.few:
            parts[str(steps)] = self._judged(model, steps, cfg, seed, rows)
        self._save_sheet(rows, f"{method}_{seed}")
        cfg, steps = (setting.guided, setting.steps) if method == BASE else (setting.negative_cfg, setting.few[0])
        return {"cfg": guidance, "few": parts, "negative": self.negatives(model, steps, cfg, seed)}

    def bounds(self) -> dict[str, dict[str, float]]:
        """What the reader makes of real pictures that it was not trained on, as drawn and through the autoencoder."""
        drawings = [shapes.drawing(index, HELD_OUT_SEED, "all") for index in range(self.setting.real)]
        found = {}
        for name, count in (("one", 1), ("two", 2)):
            chosen = [each for each in drawings if len(each.things) == count]
            pictures, asked = shapes.rendered(chosen), [each.things for each in chosen]
            again = self._host.decode_image(self._vae, self._host.encode_image(self._vae, pictures))
            found[name] = {"drawn": shape_reader.judged(pictures, asked), "again": shape_reader.judged(again, asked)}
        return found

    def negatives(self, model: Any, steps: int, cfg: float, seed: int) -> dict[str, float]:
        """Share of samples that keep their colour when a negative prompt names it, and when it names another.

        The captions name no colour; noise and captions are the same each time.

        Args:
            model: MODEL.
            steps, cfg, seed: of the sampling.
        """
        count, names = self.setting.negatives, list(shapes.COLOURS)
        corners = list(product(shapes.SHAPES, CORNERS))
        positive = self._encoded([shapes.single(*self._cut(corners, i)).text for i in range(count)])
        colours = dict(zip(names, self._encoded([f"something {name}" for name in names])[0][0].split(1), strict=True))
        shown = shape_reader.colours(self._drawn(model, positive, self._empty, steps, cfg, seed))
        others = [names[(names.index(name) + 1 + i % (len(names) - 1)) % len(names)] for i, name in enumerate(shown)]
        kept = {}
        for case, named in (("named", shown), ("another", others)):
            negative = [[torch.cat([colours[name] for name in named]), {}]]
            found = shape_reader.colours(self._drawn(model, positive, negative, steps, cfg, seed))
            kept[case] = sum(a == b for a, b in zip(found, shown, strict=True)) / count
        return kept

    @staticmethod
    def _cut(corners: Sequence[tuple[str, str]], index: int) -> tuple[str, str, str]:
        shape, corner = corners[(5 * index) % len(corners)]
        return shape, "", corner

    def _student(self, seed: int) -> Any:
        """The prior with a LoRA that was trained on its pairs by recipe fast."""
        setting = self.setting
        size = setting.training, setting.batch_size, setting.learning_rate
        name = run_name("shapes", seed, setting)
        return reflowed(self._model, self.pairs(), STUDENTS["fast"], setting.rank, size, seed, name)

    def pairs(self) -> Any:
        """The prior's pairs, of captions that it was trained with; what is missing is made."""
        setting = self.setting
        texts = [each.text for group in ("one", "two") for each in prompts(group, setting.taught // 2)]
        build = NODE_CLASS_MAPPINGS["Diff2FlowReflowPairs"]().build
        numbers = (setting.pairs, setting.steps, setting.guided, 0)
        size = {"width": shapes.SIZE, "height": shapes.SIZE, "batch_size": 32, "save_dtype": "fp32"}
        return build(self._model, self._clip, "\n".join(texts), *numbers, "shapes_binding", **size)["result"][0]

    def _judged(self, model: Any, steps: int, cfg: float, seed: int, rows: list[Tensor]) -> dict[str, Any]:
        """What is read in samples, by group; some of them go into a row of the sheet."""
        pictures = self._drawn(model, self._positive, self._empty, steps, cfg, seed)
        each = self.setting.captions
        by_group = zip(GROUPS, pictures.split(each), range(0, len(pictures), each), strict=True)
        rows.append(torch.cat([picture for part in pictures.split(each) for picture in part[:_SHOWN]], dim=1))
        found = {
            group: shape_reader.judged(part, [asked.things for asked in self._asked[first : first + each]])
            for group, part, first in by_group
        }
        return found | {name: _mean([found[group] for group in groups]) for name, groups in TOGETHER.items()}

    def _drawn(self, model: Any, positive: Any, negative: Any, steps: int, cfg: float, seed: int) -> Tensor:
        """Pictures (B, 64, 64, 3), one for each context of the positive."""
        latent = {"samples": torch.zeros(len(positive[0][0]), 4, shapes.SIZE // 8, shapes.SIZE // 8)}
        sample = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]().sample
        drawn = sample(model, positive, negative, latent, seed, steps, cfg, "euler", 1.0, "auto")[0]
        return self._host.decode_image(self._vae, drawn["samples"])

    def _encoded(self, texts: Sequence[str]) -> Any:
        """CONDITIONING of many captions, one for each sample of a batch."""
        known = {text: self._host.encode_text(self._clip, text)[0][0] for text in dict.fromkeys(texts)}
        return [[torch.cat([known[text] for text in texts]), {}]]

    def _save_sheet(self, rows: Sequence[Tensor], name: str) -> None:
        """Samples of the four groups, a row each for CFG scales (base) and step counts."""
        with written_whole(self._work / "pictures" / f"{name}.png") as temporary:
            digits.to_pil(torch.cat(list(rows)).clamp(0, 1)).save(temporary, format="PNG")
