"""Figure 8 of the paper on the tiny prior: depth by LoRAs of equal rank, steps and data, trained by each objective.

    python -m diff2flow_nodes.bench.depth_quality --models models --out results

Every run teaches the prior of synthetic scenes to estimate their depth. Reported are AbsRel, delta1 and RMSE on scenes
that neither the prior nor the LoRA has seen, fitted in log depth, for each number of steps; what an ensemble and fixed
noise do; and for scale a constant depth, a small convolutional network that was trained for as long, and true depth
through the autoencoder, which no model of it can be better than.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..depth.ensemble import flicker
from ..depth.metrics import depth_metrics, fitted
from ..files import written_whole
from ..nodes import NODE_CLASS_MAPPINGS
from . import digits, scenes
from .depth_regressor import trained_regressor
from .depth_table import markdown
from .loaded_prior import OnPrior, lora_everywhere
from .runs import Runs, ends_of_parts, require_equal_parts, run_name, write_json
from .scene_prior import HELD_OUT_SEED, depth_pictures
from .summary import summary

log = logging.getLogger(__name__)
OBJECTIVES = {
    "diff2flow": {},
    "flow_matching": {"objective": "flow_matching"},
    "diffusion": {"objective": "diffusion"},
    "diff2flow, halved": {"widening": "halved"},
    "diff2flow, velocity weighting": {"weighting": "velocity"},
    "diff2flow, all times": {"weighting": "velocity", "t_range": "full"},
}
"""What is trained, and how it differs from diff2flow as the nodes have it."""
CONSTANT, AUTOENCODER, REGRESSOR = "constant depth", "true depth through the autoencoder", "small network"
SCALES = (CONSTANT, AUTOENCODER, REGRESSOR)
METHODS = (*OBJECTIVES, *SCALES)
_FRAMES, _CLIPS, _SHOWN = 12, 4, 8
_SEED = 1
"""Of the scenes that are trained on; the prior knows others."""


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        prior: quality of the tiny prior.
        scenes: trained on.
        held_out: scenes that are measured on.
        steps, batch_size, learning_rate, rank: of the training; rank on every linear and convolution layer, first and
            last layer in full.
        sample_steps: step counts.
        ensemble: members, and how many steps each has.
        ensemble_steps: see ensemble.
        ensemble_of: methods whose ensemble is measured, too.
        schedule: of the learning rate.
        parts: the depth is measured after each of so many equal parts of the training; more than one need a constant
            rate.
        videos: how much they flicker is measured, too.

    Raises:
        ValueError: parts that the steps cannot be split into.
    """

    prior: str = "scenes"
    scenes: int = 800
    held_out: int = 100
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    rank: int = 16
    sample_steps: tuple[int, ...] = (10, 4, 2, 1)
    ensemble: int = 4
    ensemble_steps: int = 4
    ensemble_of: tuple[str, ...] = tuple(OBJECTIVES)
    schedule: str = "cosine"
    parts: int = 1
    videos: bool = True

    def __post_init__(self) -> None:
        require_equal_parts(self.steps, self.parts)


class Bench(OnPrior):
    """Everything that the runs have in common, loaded once; see `OnPrior`."""

    def __init__(self, models: Path, work: Path, setting: Setting, device: str = "cpu") -> None:
        super().__init__(models, work, setting, device)
        self._train = work / "input" / f"scenes_{setting.scenes}"
        if not self._train.is_dir():
            scenes.write(self._train, setting.scenes, seed=_SEED, depth_format="npy")
        held_out = scenes.scenes(range(setting.held_out), seed=HELD_OUT_SEED)
        self._pictures, self._truth = held_out.pictures, held_out.depth

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Trains where there is something to train, and measures."""
        if method == CONSTANT:
            return self._measured(torch.zeros_like(self._truth), CONSTANT)
        if method == AUTOENCODER:
            return self._measured(self._through_autoencoder(), AUTOENCODER)
        if method == REGRESSOR:
            return self._regressed(seed)
        name, seconds, after = run_name(f"depth {method}", seed, self.setting), 0.0, {}
        for steps in ends_of_parts(self.setting.steps, self.setting.parts):
            began = time.monotonic()
            model = self._trained(OBJECTIVES[method], seed, name, steps)
            seconds += time.monotonic() - began
            after[str(steps)] = {"steps": self._stepped(model, seed, f"{name}_after_{steps}")}
        found = after.pop(str(self.setting.steps))
        if method in self.setting.ensemble_of:
            found["ensemble"] = self._ensemble(model, seed, name)
        if self.setting.videos:
            found["flicker"] = self._flicker(model, seed)
        sizes = {"training_seconds": seconds, "trained_parameters": self._size(name)}
        return {**sizes, **found, **({"after": after} if after else {})}

    def _size(self, name: str) -> int:
        """How many numbers a LoRA's file holds beside the alphas."""
        from safetensors import safe_open

        with safe_open(str(self._host.folder("loras") / f"{name}.safetensors"), framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys() if not key.endswith(".alpha")]  # noqa: SIM118
        return sum(map(math.prod, shapes))

    def _trained(self, changes: dict[str, str], seed: int, name: str, steps: int) -> Any:
        """The prior with a LoRA trained for so many steps; goes on from where the same run was before."""
        setting, nodes = self.setting, NODE_CLASS_MAPPINGS
        dataset, _ = nodes["Diff2FlowDepthDataset"]().build(
            self._train.name, self._vae, self._clip, scenes.SIZE, flips=True
        )
        lora = lora_everywhere(setting.rank, True, changes.get("widening", "zeros"))
        [optimizer] = nodes["Diff2FlowOptimizerConfig"]().build(schedule=setting.schedule, warmup_steps=20, ema=0.98)
        [loss] = nodes["Diff2FlowLossConfig"]().build(
            **{key: value for key, value in changes.items() if key in ("weighting", "t_range")}
        )
        return nodes["Diff2FlowTrain"]().train(
            self._model, dataset, lora, changes.get("objective", "diff2flow"), steps, setting.batch_size,
            setting.learning_rate, seed, name, optimizer=optimizer, loss=loss, save_dtype="fp32",
        )["result"][0]  # fmt: skip

    def _stepped(self, model: Any, seed: int, name: str) -> dict[str, Any]:
        """The metrics for each step count."""
        return {
            str(steps): self._measured(self._raw(model, self._pictures, steps, seed), f"{name}_{steps}")
            for steps in self.setting.sample_steps
        }

    def _ensemble(self, model: Any, seed: int, name: str) -> dict[str, float]:
        """The metrics of an ensemble."""
        setting = self.setting
        merged = self._raw(model, self._pictures, setting.ensemble_steps, seed, ensemble=setting.ensemble)
        return self._measured(merged, f"{name}_ensemble")

    def _raw(
        self, model: Any, pictures: Tensor, steps: int, seed: int, ensemble: int = 1, noise: str = "fresh"
    ) -> Tensor:
        """Raw depth (B, H, W)."""
        estimate = NODE_CLASS_MAPPINGS["Diff2FlowDepth"]().estimate
        given = (model, self._clip, self._vae, pictures, steps, ensemble, scenes.SIZE, seed)
        return estimate(*given, noise=noise, batch_size=32)[1][..., 0]

    def _flicker(self, model: Any, seed: int) -> dict[str, float]:
        """How much depth flickers with the same noise for all frames and with fresh one; how much truth changes."""
        flickers: dict[str, list[float]] = {"fixed": [], "fresh": [], "truth": []}
        for number in range(_CLIPS):
            clip = scenes.clip(number, HELD_OUT_SEED, _FRAMES)
            for noise in ("fixed", "fresh"):
                raw = self._raw(model, clip.pictures, self.setting.ensemble_steps, seed, noise=noise)
                flickers[noise].append(flicker(raw))
            flickers["truth"].append(flicker(depth_pictures(clip.depth)[..., 0]))
        return {name: sum(values) / len(values) for name, values in flickers.items()}

    def _through_autoencoder(self) -> Tensor:
        shown = depth_pictures(self._truth)
        parts = [self._host.decode_image(self._vae, self._host.encode_image(self._vae, p)) for p in shown.split(32)]
        return torch.cat(parts).mean(dim=-1)

    def _regressed(self, seed: int) -> dict[str, Any]:
        """A small network, trained on the same pairs for as long as the LoRAs of that seed were."""
        seconds = self._seconds(seed)
        data = scenes.scenes(range(self.setting.scenes), seed=_SEED)
        wanted = depth_pictures(data.depth)[..., 0]
        estimate = trained_regressor(data.pictures, wanted, seconds, self.setting.batch_size, seed)
        return {"training_seconds": seconds, **self._measured(estimate(self._pictures), f"regressor_{seed}")}

    def _seconds(self, seed: int) -> float:
        """Of the quickest: the first that was trained has encoded what all share."""
        done = Runs(self._work.parent / "runs", self.setting).done()
        seconds = [done[name]["training_seconds"] for each in OBJECTIVES if (name := f"{each}/{seed}") in done]
        if not seconds:
            raise ValueError(f"'{REGRESSOR}' is trained for as long as the LoRAs: train one of seed {seed} first")
        return min(seconds)

    def _measured(self, raw: Tensor, name: str) -> dict[str, float]:
        """The metrics of raw depth (B, H, W) of the held-out scenes; saves a picture of some."""
        metric = fitted(raw, self._truth, None, "log")
        found = depth_metrics(metric, self._truth)
        rows = (self._pictures[:_SHOWN], *(_grey(depth[:_SHOWN]) for depth in (self._truth, metric)))
        sheet = torch.cat([torch.cat(list(row), dim=1) for row in rows])
        with written_whole(self._work / "pictures" / f"{name.replace(' ', '_')}.png") as temporary:
            digits.to_pil(sheet.clamp(0, 1)).save(temporary, format="PNG")
        return {key: float(found[key]) for key in ("abs_rel", "delta1", "rmse")}


def _grey(depth: Tensor) -> Tensor:
    """(B, H, W, 3), near white, each image over the range of its own log depth."""
    return 1.0 - depth_pictures(depth.float().clamp(min=1e-3))


def report(
    models: Path, out: Path, setting: Setting, methods: list[str], seeds: list[int], device: str = "cpu"
) -> Path:
    """Runs what is not done yet and writes out/depth_quality.json and .md of all runs that are.

    Args:
        models: models folder.
        out: results, and everything on the way.
        setting: of all runs.
        methods: of METHODS.
        seeds: of the runs.
        device: of the network.
    """
    runs = Runs(out / "runs", setting)
    runs.make(methods, seeds, Bench(models, out / "work", setting, device).run)
    means = summary(runs.done())
    write_json(out / "depth_quality.json", {"setting": runs.setting, "runs": runs.done(), "summary": means})
    with written_whole(out / "depth_quality.md") as temporary:
        temporary.write_text(markdown(runs.setting, means), encoding="utf-8")
    return out / "depth_quality.json"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    name = "python -m diff2flow_nodes.bench.depth_quality"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="models folder with the tiny prior, or to train it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=Setting.steps)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    setting = Setting(steps=options.steps)
    log.info("%s", report(options.models, options.out, setting, options.methods, options.seeds))


if __name__ == "__main__":
    main()
