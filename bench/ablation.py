"""The paper's ablation on the tiny prior: LoRAs of equal rank, steps and data, trained by each objective.

    python -m diff2flow_nodes.bench.ablation --models models --out results

Every run teaches the prior a style it has never seen. Reported are the flow matching loss on held-out digits, and of
samples at several step counts: the share read as the digit that was asked for, and the Fréchet distance to held-out
digits of the style, in the classifier's features and in pixels. An interrupted ablation goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import written_whole
from ..nodes import NODE_CLASS_MAPPINGS
from ..training.objective import OBJECTIVES
from . import digits, tiny_prior
from .judging import Judge, save_picture
from .loaded_prior import LoadedPrior, lora_everywhere
from .summary import summary

log = logging.getLogger(__name__)
STYLE = "golden"


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


class Bench:
    """Everything that the runs have in common, loaded once.

    Args:
        models: models folder with the prior.
        work: folder of inputs, runs and pictures.
        setting: see `Setting`.
    """

    def __init__(self, models: Path, work: Path, setting: Setting) -> None:
        ensure = tiny_prior.ensure_narrow if setting.narrow else tiny_prior.ensure
        prior = LoadedPrior(ensure(setting.prior, models), work)
        self.setting, self.work = setting, work
        self.model, self.clip, self.vae = prior.model, prior.clip, prior.vae
        self.train, self.held_out = self._datasets()
        self.judge = Judge(prior.host, self.clip, self.vae, STYLE)

    def _datasets(self) -> tuple[Any, Any]:
        """Training images of the style, and held-out digits drawn in it."""
        setting, folder = self.setting, self.work / "input"
        if not (folder / "train").is_dir():
            digits.write(folder / "train", STYLE, setting.images)
            digits.write(folder / "held_out", STYLE, setting.held_out, held_out=True)
        make = NODE_CLASS_MAPPINGS["Diff2FlowImageDataset"]().build
        return tuple(make(name, self.vae, self.clip, digits.SIZE)[0] for name in ("train", "held_out"))

    def run(self, objective: str, seed: int) -> dict[str, Any]:
        """Trains one LoRA and measures it."""
        name = f"ablation_{objective}_{seed}"
        model = self.trained(objective, seed, name)
        return {"validation": self.validation(name), **self.measured(model, seed, name)}

    def trained(self, objective: str, seed: int, name: str, loss: Any = None) -> Any:
        """The prior with a LoRA that was trained now.

        Args:
            objective: of OBJECTIVES.
            seed: of the training.
            name: of the LoRA.
            loss: D2F_LOSS; None for the defaults.
        """
        setting, nodes = self.setting, NODE_CLASS_MAPPINGS
        [watch] = nodes["Diff2FlowTrainWatch"]().build(
            self.vae, self.clip, "", 0, "1", 1.0, 64, 64, 0, validate_every=setting.steps // 3,
            validation=self.held_out,
        )  # fmt: skip
        [optimizer] = nodes["Diff2FlowOptimizerConfig"]().build(schedule="cosine", warmup_steps=10, ema=0.98)
        return nodes["Diff2FlowTrain"]().train(
            self.model, self.train, lora_everywhere(setting.rank), objective, setting.steps, setting.batch_size,
            setting.learning_rate, seed, name, optimizer=optimizer, watch=watch, loss=loss,
        )[0]  # fmt: skip

    def measured(self, model: Any, seed: int, name: str) -> dict[str, Any]:
        """Quality of a model's samples for each step count; saves a picture of some."""
        found, sampler = {}, NODE_CLASS_MAPPINGS["Diff2FlowSampler"]()
        for steps in self.setting.sample_steps:
            more = (steps, self.setting.cfg, "euler", 1.0, "auto")
            pictures, wanted = self.judge.drawn(
                lambda *given, more=more: sampler.sample(model, *given, *more)[0], seed, self.setting.samples
            )
            save_picture(pictures, self.work / "pictures" / f"{name}_{steps}.png")
            found[str(steps)] = self.judge.judged(pictures, wanted)
        return {"samples": found}

    def validation(self, name: str) -> dict[str, float]:
        """Held-out flow matching loss by training step, of the newest run of that name."""
        return {str(entry["step"]): entry["loss"] for entry in self.logged(name) if entry["kind"] == "validation"}

    def logged(self, name: str) -> list[dict[str, Any]]:
        """The log of the newest run of that name."""
        runs = sorted((self.work / "output" / "diff2flow").glob(f"{name}*"))
        return list(map(json.loads, (runs[-1] / "log.jsonl").read_text(encoding="utf-8").splitlines()))


def ablation(models: Path, out: Path, setting: Setting, seeds: int) -> Path:
    """Runs what is not done yet and writes out/ablation.json.

    Args:
        models: models folder.
        out: results, and everything on the way.
        setting: of all runs.
        seeds: runs for each objective.
    """
    path, key = out / "ablation.json", json.loads(json.dumps(asdict(setting)))
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    done = done if done.get("setting") == key else {"setting": key, "runs": {}}
    bench = Bench(models, out / "work", setting)
    for name, result in _runs(bench, done["runs"], seeds):
        done["runs"][name] = result
        done["summary"] = summary(done["runs"])
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(done, indent=1), encoding="utf-8")
        log.info("%s: %s", name, json.dumps(result))
    return path


def _runs(bench: Bench, done: Mapping[str, Any], seeds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The prior itself and every objective, seed after seed, as far as they are not done."""
    for seed in range(seeds):
        if f"base/{seed}" not in done:
            yield f"base/{seed}", bench.measured(bench.model, seed, f"base_{seed}")
        for objective in OBJECTIVES:
            if f"{objective}/{seed}" not in done:
                yield f"{objective}/{seed}", bench.run(objective, seed)


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
    log.info("%s", ablation(options.models, options.out, setting, options.seeds))


if __name__ == "__main__":
    main()
