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
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole
from ..hosts import use
from ..hosts.headless.host import HeadlessHost
from ..nodes import NODE_CLASS_MAPPINGS
from ..training.objective import OBJECTIVES
from . import classifier, digits, tiny_prior
from .frechet import frechet_distance

log = logging.getLogger(__name__)
STYLE = "golden"
_PIXELS = 4


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


class Bench:
    """Everything that the runs have in common, loaded once.

    Args:
        models: models folder with the prior.
        work: folder of inputs, runs and pictures.
        setting: see `Setting`.
    """

    def __init__(self, models: Path, work: Path, setting: Setting) -> None:
        prior = tiny_prior.ensure(setting.prior, models)
        self.setting, self.work = setting, work
        self._host = HeadlessHost(models, work / "input", work / "output")
        use(self._host)
        self.model, self.clip, self.vae = self._host.load_checkpoint(prior.name)
        self.train, self.held_out = self._datasets()
        self.real = self._real_pictures()

    def _datasets(self) -> tuple[Any, Any]:
        """Training images of the style, and held-out digits drawn in it."""
        setting, folder = self.setting, self.work / "input"
        if not (folder / "train").is_dir():
            digits.write(folder / "train", STYLE, setting.images)
            digits.write(folder / "held_out", STYLE, setting.held_out, held_out=True)
        make = NODE_CLASS_MAPPINGS["Diff2FlowImageDataset"]().build
        return tuple(make(name, self.vae, self.clip, digits.SIZE)[0] for name in ("train", "held_out"))

    def _real_pictures(self) -> Tensor:
        """Held-out digits in the style, as the autoencoder gives them back."""
        images, _ = digits.split(held_out=True)
        pictures = digits.render(images, digits.STYLES[STYLE])
        parts = pictures.split(50)
        encoded = (self._host.decode_image(self.vae, self._host.encode_image(self.vae, part)) for part in parts)
        return torch.cat(list(encoded))

    def run(self, objective: str, seed: int) -> dict[str, Any]:
        """Trains one LoRA and measures it."""
        setting, nodes = self.setting, NODE_CLASS_MAPPINGS
        switches = dict.fromkeys(("attention_out", "feed_forward", "proj", "conv", "time"), True)
        [lora] = nodes["Diff2FlowLoraConfig"]().build("custom", setting.rank, float(setting.rank), **switches)
        [watch] = nodes["Diff2FlowTrainWatch"]().build(
            self.vae, self.clip, "", 0, "1", 1.0, 64, 64, 0, validate_every=setting.steps // 3,
            validation=self.held_out,
        )  # fmt: skip
        [optimizer] = nodes["Diff2FlowOptimizerConfig"]().build(schedule="cosine", warmup_steps=10, ema=0.98)
        name = f"ablation_{objective}_{seed}"
        model, *_ = nodes["Diff2FlowTrain"]().train(
            self.model, self.train, lora, objective, setting.steps, setting.batch_size, setting.learning_rate, seed,
            name, optimizer=optimizer, watch=watch,
        )  # fmt: skip
        return {"validation": self._validation(name), **self.measured(model, seed, name)}

    def measured(self, model: Any, seed: int, name: str) -> dict[str, Any]:
        """Quality of a model's samples for each step count; saves a picture of some."""
        found = {}
        for steps in self.setting.sample_steps:
            pictures, wanted = self._samples(model, steps, seed)
            self._save_picture(pictures, f"{name}_{steps}")
            found[str(steps)] = {
                "accuracy": float((classifier.classify(pictures) == wanted).float().mean()),
                "frechet_features": frechet_distance(classifier.features(pictures), classifier.features(self.real)),
                "frechet_pixels": frechet_distance(_small(pictures), _small(self.real)),
            }
        return {"samples": found}

    def _samples(self, model: Any, steps: int, seed: int) -> tuple[Tensor, Tensor]:
        """Pictures, equally many of each digit, and the digits."""
        each = self.setting.samples // len(digits.WORDS)
        empty = self._host.encode_text(self.clip, "")
        sampler = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]()
        pictures = []
        for digit in range(len(digits.WORDS)):
            positive = self._host.encode_text(self.clip, digits.caption(digit))
            latent = {"samples": torch.zeros(each, 4, digits.SIZE // 8, digits.SIZE // 8)}
            drawn = sampler.sample(
                model, positive, empty, latent, 1000 * seed + digit, steps, self.setting.cfg, "euler", 1.0, "auto"
            )[0]
            pictures.append(self._host.decode_image(self.vae, drawn["samples"]))
        return torch.cat(pictures), torch.arange(len(digits.WORDS)).repeat_interleave(each)

    def _save_picture(self, pictures: Tensor, name: str) -> None:
        """Two of each digit, in two rows."""
        each = len(pictures) // len(digits.WORDS)
        rows = [torch.cat(list(pictures[i::each]), dim=1) for i in range(min(2, each))]
        path = self.work / "pictures" / f"{name}.png"
        with written_whole(path) as temporary:
            digits.to_pil(torch.cat(rows).clamp(0, 1)).save(temporary, format="PNG")

    def _validation(self, name: str) -> dict[str, float]:
        """Held-out flow matching loss by training step, from the newest run's log."""
        runs = sorted((self.work / "output" / "diff2flow").glob(f"{name}*"))
        lines = (runs[-1] / "log.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [entry for entry in map(json.loads, lines) if entry["kind"] == "validation"]
        return {str(entry["step"]): entry["loss"] for entry in entries}


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


def summary(runs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the seeds of every number, by objective."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, result in runs.items():
        numbers = found.setdefault(name.partition("/")[0], {})
        for key, value in _flat(result):
            numbers.setdefault(key, []).append(value)
    return {name: {key: _spread(values) for key, values in numbers.items()} for name, numbers in found.items()}


def _spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "seeds": len(values)}


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _small(pictures: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) as (B, 48): mean colours of 4×4 fields, which see colour, thickness and slant."""
    small = torch.nn.functional.interpolate(pictures.movedim(-1, 1), size=(_PIXELS, _PIXELS), mode="area")
    return small.flatten(1)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    name = "python -m diff2flow_nodes.bench.ablation"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="models folder with the tiny prior, or to train it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--prior", choices=sorted(tiny_prior.QUALITIES), default="bench")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--learning-rate", type=float, default=Setting.learning_rate)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    setting = Setting(prior=options.prior, steps=options.steps, learning_rate=options.learning_rate)
    log.info("%s", ablation(options.models, options.out, setting, options.seeds))


if __name__ == "__main__":
    main()
