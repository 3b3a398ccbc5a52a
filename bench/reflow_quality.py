"""Table 3 of the paper on the tiny prior: the base, the paper's recipe and ours at few steps.

    python -m diff2flow_nodes.bench.reflow_quality --models models --out results

Reported for each number of steps are the share of samples that is read as the digit that was asked for, the Fréchet
distances to held-out digits, and how far the pictures are from the teacher's own of the same noise; and how straight
the paths are. Each run is a file of its own: an interrupted report goes
on where it was, and several processes can share it (`--seeds`, `--methods`).
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import written_whole
from ..nodes import NODE_CLASS_MAPPINGS
from . import digits, tiny_prior
from .dpm_solver import dpm_solver
from .judging import Judge, save_picture
from .loaded_prior import OnPrior, lora_everywhere
from .reflow_table import markdown
from .runs import Runs, run_name, write_json
from .summary import summary

log = logging.getLogger(__name__)
UNGUIDED = "base Euler, CFG 1"
BASES = ("base Euler", "base DPM-Solver++", UNGUIDED)
STUDENTS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper"},
    "fast": {"recipe": "fast"},
    "fast, velocity weighting": {"recipe": "fast", "weighting": "velocity"},
    "fast, clamped weighting": {"recipe": "fast", "weighting": "clamped"},
    "fast, no caption dropout": {"recipe": "fast", "caption_dropout": 0.0},
    "fast, all pairs": {"recipe": "fast", "drop_worst": 0.0},
    "fast, consistency": {"recipe": "fast", "consistency": 0.25},
    "windows": {"recipe": "windows", "teacher_cfg": tiny_prior.CFG},
}
AGAIN = "fast, 2-reflow"
_MEASURED = 30
"""Paths whose straightness is measured."""
METHODS = (*BASES, *STUDENTS, AGAIN)


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        prior: quality of the tiny prior.
        pairs: that are trained on.
        teacher_steps, teacher_cfg: of the pairs; the base is sampled with that cfg, too.
        steps, batch_size, learning_rate, rank: of the training; rank on every linear and convolution layer.
        window_training: steps of the training by windows, each of which calls the teacher 16 times.
        samples: drawn for each step count.
        sample_steps: step counts.
        cfg: of the students' samples.
        seed: of the pairs.
    """

    prior: str = "bench"
    pairs: int = 2000
    teacher_steps: int = 25
    teacher_cfg: float = tiny_prior.CFG
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-3
    rank: int = 16
    window_training: int = 150
    samples: int = 300
    sample_steps: tuple[int, ...] = (25, 8, 4, 2, 1)
    cfg: float = 1.0
    seed: int = 0


def reflowed(
    model: Any, data: Any, recipe: dict[str, Any], rank: int, size: tuple[int, int, float], seed: int, name: str
) -> Any:
    """A model with a LoRA on every layer that was trained by a recipe of reflow.

    Args:
        model: MODEL.
        data: D2F_DATASET, pairs; images for recipe windows.
        recipe: inputs of Diff2Flow Reflow Recipe.
        rank: of the LoRA.
        size: steps, batch size and learning rate.
        seed: of the training.
        name: of the LoRA.
    """
    [loss] = NODE_CLASS_MAPPINGS["Diff2FlowReflowRecipe"]().build(**recipe)
    [optimizer] = NODE_CLASS_MAPPINGS["Diff2FlowOptimizerConfig"]().build(schedule="cosine", warmup_steps=20, ema=0.99)
    train = NODE_CLASS_MAPPINGS["Diff2FlowTrain"]().train
    layers = lora_everywhere(rank)
    return train(
        model, data, layers, "diff2flow", *size, seed, name, optimizer=optimizer, loss=loss, save_dtype="fp32"
    )["result"][0]


class Bench(OnPrior):
    """Everything that the runs have in common, loaded once; see `OnPrior`."""

    def __init__(self, models: Path, work: Path, setting: Setting, device: str = "cpu") -> None:
        super().__init__(models, work, setting, device)
        self._judge = Judge(self._prior, "plain")

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Trains where there is something to train, and measures."""
        began, name = time.monotonic(), run_name(method, seed, self.setting)
        model = self._model if method in BASES else self._student(method, seed, name)
        trained = time.monotonic() - began
        cfg = self.setting.cfg if method not in BASES or method == UNGUIDED else self.setting.teacher_cfg
        draw = self._stock if method == "base DPM-Solver++" else self._flow
        samples = {
            str(steps): self._measured(partial(draw, model, steps, cfg), seed, f"{name}_{steps}")
            for steps in self.setting.sample_steps
        }
        straightness = {}
        if method != "base DPM-Solver++":
            straightness = self._judge.straightness(model, cfg, self.setting.teacher_steps, seed, _MEASURED)
        return {"training_seconds": trained, "samples": samples, "straightness": straightness}

    def _student(self, method: str, seed: int, name: str) -> Any:
        """The prior with a LoRA that was trained on the pairs."""
        if method == AGAIN:
            first = self._reflowed(seed)
            pairs = self._pairs(first, self.setting.cfg, f"reflow_{name}")
            return self._trained(first, pairs, STUDENTS["fast"], seed, name)
        data = self._images() if STUDENTS[method]["recipe"] == "windows" else self.pairs()
        return self._trained(self._model, data, STUDENTS[method], seed, name)

    def _reflowed(self, seed: int) -> Any:
        """The prior with the LoRA of method fast; trained where it was not yet."""
        name = run_name("fast", seed, self.setting)
        if not (self._host.folder("loras") / f"{name}.safetensors").is_file():
            return self._student("fast", seed, name)
        return NODE_CLASS_MAPPINGS["Diff2FlowLoraLoader"]().load(self._model, f"{name}.safetensors", 1.0)[0]

    def pairs(self) -> Any:
        """The prior's pairs; what is missing is made."""
        return self._pairs(self._model, self.setting.teacher_cfg, "reflow_quality")

    def _pairs(self, model: Any, cfg: float, folder: str) -> Any:
        setting, prompts = self.setting, "\n".join(map(digits.caption, range(len(digits.WORDS))))
        build = NODE_CLASS_MAPPINGS["Diff2FlowReflowPairs"]().build
        numbers = (setting.pairs, setting.teacher_steps, cfg, setting.seed)
        size = {"width": digits.SIZE, "height": digits.SIZE, "batch_size": 32, "save_dtype": "fp32"}
        return build(model, self._clip, prompts, *numbers, folder, **size)["result"][0]

    def _images(self) -> Any:
        """The digits that the prior was trained on, for recipe windows."""
        folder = self._work / "input" / "plain"
        if not folder.is_dir():
            digits.write(folder, "plain", 400)
        return NODE_CLASS_MAPPINGS["Diff2FlowImageDataset"]().build("plain", self._vae, self._clip, digits.SIZE)[0]

    def _trained(self, model: Any, data: Any, recipe: dict[str, Any], seed: int, name: str) -> Any:
        setting = self.setting
        steps = setting.window_training if recipe["recipe"] == "windows" else setting.steps
        size = steps, setting.batch_size, setting.learning_rate
        return reflowed(model, data, recipe, setting.rank, size, seed, name)

    def _measured(self, draw: Any, seed: int, name: str) -> dict[str, float]:
        pictures, wanted = self._judge.drawn_together(draw, seed, self.setting.samples)
        save_picture(pictures, self._work / "pictures" / f"{name}.png")
        away = (pictures - self._teachers(seed)).square().mean().sqrt()
        return {**self._judge.judged(pictures, wanted), "rmse_to_teacher": float(away)}

    def _teachers(self, seed: int) -> Tensor:
        """The teacher's own pictures of the same noises, in as many steps as the pairs."""
        from safetensors.torch import load_file, save_file

        setting = self.setting
        file = (
            self._work / f"teacher_{seed}_{setting.samples}_{setting.teacher_steps}_{setting.teacher_cfg}.safetensors"
        )
        if not file.is_file():
            draw = partial(self._flow, self._model, setting.teacher_steps, setting.teacher_cfg)
            with written_whole(file) as temporary:
                save_file({"pictures": self._judge.drawn_together(draw, seed, setting.samples)[0]}, str(temporary))
        return load_file(file)["pictures"]

    def _flow(self, model: Any, steps: int, cfg: float, positive: Any, negative: Any, latent: Any, seed: int) -> Any:
        sample = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]().sample
        return sample(model, positive, negative, latent, seed, steps, cfg, "euler", 1.0, "auto")[0]

    def _stock(self, model: Any, steps: int, cfg: float, positive: Any, negative: Any, latent: Any, seed: int) -> Any:
        sampler, sigmas = dpm_solver(self._host, steps)
        return self._host.sample(model, positive, negative, latent, seed, sampler, sigmas, cfg)


def report(
    models: Path, out: Path, setting: Setting, methods: list[str], seeds: list[int], device: str = "cpu"
) -> Path:
    """Runs what is not done yet and writes out/reflow_quality.json and .md of all runs that are.

    Args:
        models: models folder.
        out: results, and everything on the way.
        setting: of all runs.
        methods: of METHODS.
        seeds: of the runs.
        device: of the network.
    """
    runs, bench = Runs(out / "runs", setting), Bench(models, out / "work", setting, device)
    if set(methods) - set(BASES):
        bench.pairs()
    runs.make(methods, seeds, bench.run)
    return collected(out, runs)


def collected(out: Path, runs: Runs) -> Path:
    """Writes reflow_quality.json of all runs that are done, and reflow_quality.md where none is missing for it."""
    means = summary(runs.done())
    write_json(out / "reflow_quality.json", {"setting": runs.setting, "runs": runs.done(), "summary": means})
    if {"base Euler", "base DPM-Solver++", "fast"} <= set(means):
        with written_whole(out / "reflow_quality.md") as temporary:
            temporary.write_text(markdown(runs.setting, means), encoding="utf-8")
    return out / "reflow_quality.json"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    name = "python -m diff2flow_nodes.bench.reflow_quality"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="models folder with the tiny prior, or to train it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%s", report(options.models, options.out, Setting(), options.methods, options.seeds))


if __name__ == "__main__":
    main()
