"""LoRAs of equal rank, steps and data on the tiny prior, trained by each objective: what the paper's ablations compare.

    python -m diff2flow_nodes.bench.ablation --models models --out results

A run teaches the prior a style it has never seen, another size, or goes on with what it was trained on, as the setting
says. Reported are the flow matching loss on held-out digits, and of samples at several step counts: the share read as
the digit that was asked for, and the Fréchet distance to held-out digits of that style and size, in the classifier's
features and in pixels. An interrupted report goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..nodes import NODE_CLASS_MAPPINGS
from ..training.objective import OBJECTIVES, Objective, ObjectiveSettings
from ..training.validation import Validation
from . import digits, tiny_prior
from .judging import Judge, save_picture
from .loaded_prior import LoadedPrior, lora_everywhere
from .runs import Runs, ends_of_parts, require_equal_parts, write_json
from .summary import summary

log = logging.getLogger(__name__)
BASE = "base"
VARIANTS: dict[str, dict[str, Any]] = {
    "diff2flow, velocity weighting": {"weighting": "velocity"},
    "diff2flow, eps weighting": {"weighting": "eps"},
    "diff2flow, all times": {"t_range": "full"},
    "diff2flow, middle times": {"time_distribution": "logit_normal"},
    "diff2flow, optimal transport": {"pairing": "optimal_transport"},
}
"""Other loss settings of an objective, which is named before the comma."""
METHODS = (BASE, *OBJECTIVES, *VARIANTS)


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        prior: quality of the tiny prior.
        steps, batch_size, learning_rate, rank: of the training; rank on every linear and convolution layer.
        images: trained on.
        held_out: images that are validated on and compared with.
        samples: drawn for each step count.
        sample_steps: step counts.
        cfg: of the samples.
        narrow: the prior as narrow as it was trained, which is many times faster.
        style: of digits.STYLES.
        size: of the pictures, in pixels; the prior was trained at 64.
        parts: the training is measured after each of so many equal parts; more than one need a constant rate.
        schedule: of the learning rate.
        unguided: samples without guidance are measured, too.

    Raises:
        ValueError: parts that the steps cannot be split into.
    """

    prior: str = "bench"
    steps: int = 240
    batch_size: int = 4
    learning_rate: float = 5e-4
    rank: int = 16
    images: int = 200
    held_out: int = 100
    samples: int = 50
    sample_steps: tuple[int, ...] = (25, 4)
    cfg: float = tiny_prior.CFG
    narrow: bool = False
    style: str = "golden"
    size: int = digits.SIZE
    parts: int = 1
    schedule: str = "cosine"
    unguided: bool = False

    def __post_init__(self) -> None:
        require_equal_parts(self.steps, self.parts)


class Bench:
    """Everything that the runs have in common, loaded once.

    Args:
        models: models folder with the prior.
        work: folder of inputs, runs and pictures.
        setting: see `Setting`.
        device: that the network is on.
    """

    def __init__(self, models: Path, work: Path, setting: Setting, device: str = "cpu") -> None:
        ensure = tiny_prior.ensure_narrow if setting.narrow else tiny_prior.ensure
        prior = LoadedPrior(ensure(setting.prior, models), work, device)
        self.setting, self.work, self.host = setting, work, prior.host
        self.model, self.clip, self.vae = prior.model, prior.clip, prior.vae
        self.train, self.held_out = self._datasets()
        self.judge = Judge(prior, setting.style, setting.size)

    def _datasets(self) -> tuple[Any, Any]:
        """Training images of the style, and held-out digits drawn in it."""
        setting, folder = self.setting, self.work / "input"
        if not (folder / "held_out").is_dir():
            digits.write(folder / "train", setting.style, setting.images, size=setting.size)
            digits.write(folder / "held_out", setting.style, setting.held_out, held_out=True, size=setting.size)
        make = NODE_CLASS_MAPPINGS["Diff2FlowImageDataset"]().build
        return tuple(make(name, self.vae, self.clip, setting.size, bucket_step=8)[0] for name in ("train", "held_out"))

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Trains one LoRA, where there is one to train, and measures it after each part of the training."""
        name = f"{self.setting.style}_{self.setting.size}_{method.replace(', ', '_').replace(' ', '_')}_{seed}"
        if method == BASE:
            return {"validation": {"0": self._loss_before(method, seed)}, **self.measured(self.model, seed, name)}
        found = {}
        for steps in ends_of_parts(self.setting.steps, self.setting.parts):
            model = self.trained(method, seed, name, steps)
            found[str(steps)] = self.measured(model, seed, f"{name}_after_{steps}")
        validation = {"0": self._loss_before(method, seed), **self.validation(name)}
        after = {"after": found} if self.setting.parts > 1 else {}
        return {"validation": validation, **found[str(self.setting.steps)], **after}

    def trained(self, method: str, seed: int, name: str, steps: int) -> Any:
        """The prior with a LoRA trained for so many steps; goes on from where the same run was before.

        Args:
            method: of METHODS.
            seed: of the training.
            name: of the run.
            steps: of the training.
        """
        setting, nodes = self.setting, NODE_CLASS_MAPPINGS
        [watch] = nodes["Diff2FlowTrainWatch"]().build(
            self.vae, self.clip, "", 0, "1", 1.0, setting.size, setting.size, 0,
            validate_every=max(1, setting.steps // (3 * setting.parts)), validation=self.held_out,
        )  # fmt: skip
        warm_up = min(10, setting.steps // 4)
        [optimizer] = nodes["Diff2FlowOptimizerConfig"]().build(
            schedule=setting.schedule, warmup_steps=warm_up, ema=0.98
        )
        [loss] = nodes["Diff2FlowLossConfig"]().build(**VARIANTS.get(method, {}))
        return nodes["Diff2FlowTrain"]().train(
            self.model, self.train, lora_everywhere(setting.rank), _objective(method), steps, setting.batch_size,
            setting.learning_rate, seed, f"ablation_{name}", loss=loss, optimizer=optimizer, watch=watch,
        )["result"][0]  # fmt: skip

    def measured(self, model: Any, seed: int, name: str) -> dict[str, Any]:
        """Quality of a model's samples for each step count; saves a picture of some."""
        cfgs = {"samples": self.setting.cfg, **({"unguided": 1.0} if self.setting.unguided else {})}
        return {
            kind: {
                str(steps): self._quality(model, seed, steps, cfg, f"{name}_{kind}_{steps}")
                for steps in self.setting.sample_steps
            }
            for kind, cfg in cfgs.items()
        }

    def _quality(self, model: Any, seed: int, steps: int, cfg: float, name: str) -> dict[str, float]:
        sample = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]().sample

        def draw(*given: Any) -> Any:
            return sample(model, *given, steps, cfg, "euler", 1.0, "auto")[0]

        pictures, wanted = self.judge.drawn_together(draw, seed, self.setting.samples)
        save_picture(pictures, self.work / "pictures" / f"{name}.png")
        return self.judge.judged(pictures, wanted)

    def _loss_before(self, method: str, seed: int) -> float:
        """Held-out flow matching loss of the prior itself, asked in the way that the method trains."""
        goal = replace(ObjectiveSettings(), name=_objective(method))
        objective = Objective(goal, self.model.facts.schedule, self.model.facts.prediction)
        with self.host.training(self.model) as backbone:
            return Validation(self.held_out, objective, seed, self.setting.batch_size).losses(backbone)["loss"]

    def validation(self, name: str) -> dict[str, float]:
        """Held-out flow matching loss by training step, of the newest run of that name."""
        return {str(entry["step"]): entry["loss"] for entry in self.logged(name) if entry["kind"] == "validation"}

    def logged(self, name: str) -> list[dict[str, Any]]:
        """The log of the newest run of that name."""
        runs = sorted((self.work / "output" / "diff2flow").glob(f"ablation_{name}*"))
        return list(map(json.loads, (runs[-1] / "log.jsonl").read_text(encoding="utf-8").splitlines()))


def _objective(method: str) -> str:
    """What a method minimises; the base's loss is that of diff2flow, which changes nothing."""
    return OBJECTIVES[0] if method == BASE else method.partition(", ")[0]


def ablation(
    models: Path,
    out: Path,
    setting: Setting,
    seeds: Iterable[int],
    methods: Iterable[str] = METHODS[:4],
    device: str = "cpu",
) -> Path:
    """Runs what is not done yet and writes out/ablation.json of all runs that are.

    Args:
        models: models folder.
        out: results, and everything on the way.
        setting: of all runs.
        seeds: of the runs.
        methods: of METHODS.
        device: of the network.

    Raises:
        ValueError: another method.
    """
    wanted = list(methods)
    for method in wanted:
        if method not in METHODS:
            raise ValueError(f"the method {method!r} is none of {', '.join(METHODS)}")
    runs, bench = Runs(out / "runs", setting), Bench(models, out / "work", setting, device)
    runs.make(wanted, seeds, bench.run)
    path = out / "ablation.json"
    write_json(path, {"setting": runs.setting, "runs": runs.done(), "summary": summary(runs.done())})
    return path


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    name = "python -m diff2flow_nodes.bench.ablation"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="models folder with the tiny prior, or to train it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--prior", choices=("bench", "demo"), default="bench")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--learning-rate", type=float, default=Setting.learning_rate)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    setting = Setting(prior=options.prior, steps=options.steps, learning_rate=options.learning_rate)
    log.info("%s", ablation(options.models, options.out, setting, range(options.seeds)))


if __name__ == "__main__":
    main()
