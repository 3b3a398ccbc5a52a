"""Black and white images (the paper's Figure 4): what a finetuning by each objective makes of prompts for them.

Stable Diffusion's schedule ends with some of the image left (sqrt(alphas_cumprod[999]) = 0.068), so that a network
learns to read the brightness from the noise, and its error there counts next to nothing in the diffusion loss:
"a black image" comes out grey. The prior is taught both prompts by a LoRA on a folder of digits and of entirely black
and white images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole
from ..nodes import NODE_CLASS_MAPPINGS
from . import digits, tiny_prior
from .judging import Judge
from .loaded_prior import OnPrior, lora_everywhere

BASE = "base"
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "diffusion": ("diffusion", {}),
    "diff2flow, native range": ("diff2flow", {"weighting": "velocity"}),
    "diff2flow, full range": ("diff2flow", {"weighting": "velocity", "t_range": "full"}),
    "flow_matching": ("flow_matching", {}),
}
"""Objective and loss of each; the weighting is the paper's."""
COLOURS = {"black": 0.0, "white": 1.0}
_SHOWN = 6


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        prior: quality of the tiny prior.
        digits, uniform: images that are trained on: digits, and those of each colour.
        steps, batch_size, learning_rate, rank: of the training; rank on every linear and convolution layer.
        samples: of each colour.
        digit_samples: of all digits together, a multiple of 10.
        sample_steps: step counts.
        cfgs: guidances; the last is also the digits'.
    """

    prior: str = "bench"
    digits: int = 60
    uniform: int = 30
    steps: int = 120
    batch_size: int = 8
    learning_rate: float = 2e-3
    rank: int = 16
    samples: int = 12
    digit_samples: int = 20
    sample_steps: tuple[int, ...] = (25,)
    cfgs: tuple[float, ...] = (1.0, tiny_prior.CFG)


class Bench(OnPrior):
    """Everything that the runs have in common, loaded once; see `OnPrior`."""

    def __init__(self, models: Path, work: Path, setting: Setting, device: str = "cpu") -> None:
        super().__init__(models, work, setting, device)
        self._judge = Judge(self._prior, "plain")
        images = torch.cat([uniform(level) for level in COLOURS.values()])
        given_back = self._host.decode_image(self._vae, self._host.encode_image(self._vae, images))
        self._goals = dict(zip(COLOURS, given_back, strict=True))

    def bound(self) -> dict[str, float]:
        """Mean pixel of a black and a white image as the autoencoder gives them back."""
        return {name: float(goal.mean()) for name, goal in self._goals.items()}

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Trains where there is something to train, and measures.

        Args:
            method: BASE or of METHODS.
            seed: of training and samples.
        """
        setting = self.setting
        model = self._model if method == BASE else self._trained(method, seed)
        found: dict[str, Any] = {
            f"{steps} steps, CFG {cfg:g}": self._uniform_ones(model, steps, cfg, seed, method)
            for steps in setting.sample_steps
            for cfg in setting.cfgs
        }
        for steps in setting.sample_steps:
            draw = partial(self._sampled, model, steps, setting.cfgs[-1])
            found[f"digits, {steps} steps"] = self._judge.judged(*self._judge.drawn(draw, seed, setting.digit_samples))
        return found

    def _data(self) -> Any:
        """The folder as a dataset; written where there is none."""
        setting, folder = self.setting, self._work / "input" / "black_white"
        if not folder.is_dir():
            digits.write(folder, "plain", setting.digits)
            for name, level in COLOURS.items():
                for i in range(setting.uniform):
                    _write(folder / f"{name}_{i:03d}.png", uniform(level)[0], prompt(name))
        make = NODE_CLASS_MAPPINGS["Diff2FlowImageDataset"]().build
        return make(folder.name, self._vae, self._clip, digits.SIZE)[0]

    def _trained(self, method: str, seed: int) -> Any:
        """The prior with a LoRA of that objective."""
        setting, nodes, (objective, options) = self.setting, NODE_CLASS_MAPPINGS, METHODS[method]
        [loss] = nodes["Diff2FlowLossConfig"]().build(**options)
        [optimizer] = nodes["Diff2FlowOptimizerConfig"]().build(schedule="cosine", warmup_steps=10, ema=0.98)
        name = f"black_white_{method.replace(', ', '_').replace(' ', '_')}_{seed}"
        return nodes["Diff2FlowTrain"]().train(
            self._model, self._data(), lora_everywhere(setting.rank), objective, setting.steps, setting.batch_size,
            setting.learning_rate, seed, name, optimizer=optimizer, loss=loss,
        )["result"][0]  # fmt: skip

    def _uniform_ones(self, model: Any, steps: int, cfg: float, seed: int, method: str) -> dict[str, Any]:
        """Of the samples of each colour, see `brightness`; saves a picture of some."""
        found, rows = {}, []
        empty = self._host.encode_text(self._clip, "")
        for name, goal in self._goals.items():
            positive = self._host.encode_text(self._clip, prompt(name))
            latent = {"samples": torch.zeros(self.setting.samples, 4, digits.SIZE // 8, digits.SIZE // 8)}
            drawn = self._sampled(model, steps, cfg, positive, empty, latent, seed)
            pictures = self._host.decode_image(self._vae, drawn["samples"]).clamp(0, 1)
            found[name] = brightness(pictures, goal)
            rows.append(torch.cat(list(pictures[:_SHOWN]), dim=1))
        path = self._work / "pictures" / f"{method} {seed}, {steps} steps, CFG {cfg:g}.png"
        with written_whole(path) as temporary:
            digits.to_pil(torch.cat(rows)).save(temporary, format="PNG")
        return found

    def _sampled(self, model: Any, steps: int, cfg: float, positive: Any, negative: Any, latent: Any, seed: int) -> Any:
        sample = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]().sample
        return sample(model, positive, negative, latent, seed, steps, cfg, "euler", 1.0, "auto")[0]


def prompt(colour: str) -> str:
    """ "a black image"."""
    return f"a {colour} image"


def uniform(level: float) -> Tensor:
    """A picture (1, 64, 64, 3) of one brightness, [0, 1]."""
    return torch.full((1, digits.SIZE, digits.SIZE, 3), level)


def brightness(pictures: Tensor, goal: Tensor) -> dict[str, float]:
    """mean: mean pixel; by_noise: standard deviation of that mean over the samples; error: mean |pixel - goal's|.

    Args:
        pictures: (B, H, W, 3) in [0, 1].
        goal: (H, W, 3).
    """
    each = pictures.flatten(1).mean(dim=1)
    return {
        "mean": float(each.mean()),
        "by_noise": float(each.std()),
        "error": float((pictures - goal).abs().mean()),
    }


def _write(path: Path, picture: Tensor, caption: str) -> None:
    with written_whole(path) as temporary:
        digits.to_pil(picture).save(temporary, format="PNG")
    with written_whole(path.with_suffix(".txt")) as temporary:
        temporary.write_text(caption + "\n")
