"""Whether negative prompts still work after reflow: `python -m diff2flow_nodes.bench.reflow_negatives`.

Samples without a prompt, once without a negative and once with a digit as the negative, at CFG 2 and from the same
noise: how many are read as that digit. Uses the LoRAs that `reflow_quality` has trained (seed 0).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from ..hosts import use
from ..hosts.headless.host import HeadlessHost
from ..nodes import NODE_CLASS_MAPPINGS
from . import classifier, digits, tiny_prior
from .reflow_quality import Setting
from .runs import run_name, write_json

log = logging.getLogger(__name__)
EACH, _CFG = 20, 2.0
"""Samples of each digit; guidance."""
_STUDENTS = ("fast", "paper")


def shares(host: HeadlessHost, prior: str, lora: str, steps: int, each: int = EACH) -> dict[str, float]:
    """Share read as a digit without it as the negative, and with it; the mean over the digits.

    Args:
        host: with the models.
        prior: the checkpoint's name.
        lora: a LoRA's name, "" for none.
        steps: of the sampling.
        each: samples of each digit.
    """
    model, clip, vae = host.load_checkpoint(prior)
    if lora:
        model = NODE_CLASS_MAPPINGS["Diff2FlowLoraLoader"]().load(model, lora, 1.0)[0]
    empty = host.encode_text(clip, "")
    found = {"without": 0.0, "with": 0.0}
    for digit in range(len(digits.WORDS)):
        negatives = {"without": empty, "with": host.encode_text(clip, digits.caption(digit))}
        for name, negative in negatives.items():
            read = classifier.classify(host.decode_image(vae, _drawn(model, empty, negative, steps, digit, each)))
            found[name] += float((read == digit).float().mean()) / len(digits.WORDS)
    return found


def _drawn(model: Any, positive: Any, negative: Any, steps: int, seed: int, each: int) -> Any:
    latent = {"samples": torch.zeros(each, 4, digits.SIZE // 8, digits.SIZE // 8)}
    sample = NODE_CLASS_MAPPINGS["Diff2FlowSampler"]().sample
    return sample(model, positive, negative, latent, 500 + seed, steps, _CFG, "euler", 1.0, "auto")[0]["samples"]


def measured(models: Path, work: Path, setting: Setting, device: str = "cpu", each: int = EACH) -> dict[str, Any]:
    """The shares of the base in 25 steps and of the students in 4.

    Args:
        models: models folder with the prior and the LoRAs of seed 0.
        work: folder of inputs and outputs.
        setting: that the LoRAs were trained by.
        device: of the network.
        each: samples of each digit.
    """
    host = HeadlessHost(models, work / "input", work / "output", device)
    use(host)
    prior = tiny_prior.ensure_narrow(setting.prior, models).name
    found = {"base, 25 steps": shares(host, prior, "", 25, each)}
    for method in _STUDENTS:
        lora = f"{run_name(method, 0, setting)}.safetensors"
        found[f"{method}, 4 steps"] = shares(host, prior, lora, 4, each)
    return {"samples": each * len(digits.WORDS), "cfg": _CFG, "shares": found}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m diff2flow_nodes.bench.reflow_negatives")
    parser.add_argument("--models", type=Path, required=True, help="models folder with the prior and the LoRAs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = options.out / "reflow_negatives.json"
    write_json(path, measured(options.models, options.out, Setting()))
    log.info("%s", path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
