"""`make demo`: the tiny prior, a finetuning and a reflow, headless, and a picture of each."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..cli import main as run_command
from . import digits, tiny_prior
from .demo_picture import Row, compose
from .wide_lora import widen_file

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "example_workflows" / "api"
Changes = Mapping[str, Mapping[str, Any]]
STYLE, IMAGES = "golden", 40
DIGITS = ("demo", "digits", "bench")
"""Qualities of `tiny_prior` that draw digits, the quickest first."""
GOLDEN: dict[str, dict[str, Any]] = {
    "Checkpoint": {"ckpt_name": "tiny_prior_demo.safetensors"},
    "Images and captions": {"folder": "golden_digits", "resolution": 64, "trigger": "", "default_caption": ""},
    "What is trained": {"preset": "paper-small"},
    "How it learns": {"schedule": "cosine", "warmup_steps": 10, "checkpointing": False},
    "Watch": {"sample_every": 0},
    "Train": {
        **{"steps": 240, "batch_size": 4, "learning_rate": 1e-3, "output_name": "golden_digits"},
        **{"recommended_steps": 8, "recommended_cfg": 3.0},
    },
    "Positive": {"text": "a handwritten three"},
    "Size and batch": {"width": 64, "height": 64, "batch_size": 4},
    "Before": {"cfg": 3.0, "step_counts": "25, 8, 4, 2"},
    "After": {"cfg": 3.0, "step_counts": "25, 8, 4, 2"},
    "Sample": {"steps": 8, "cfg": 3.0},
}
"""What the template finetune_and_sample is told for the tiny prior, by the titles of its nodes."""
STRAIGHT: dict[str, dict[str, Any]] = {
    "Pairs of noise and image": {
        "prompts": "a handwritten {zero|one|two|three|four|five|six|seven|eight|nine}",
        **{"count": 320, "steps": 16, "cfg": 3.0, "folder": "straight_digits"},
        **{"width": 64, "height": 64, "batch_size": 32},
    },
    "What is trained": {"preset": "custom", "rank": 16, "alpha": 16.0, "conv": True},
    "How it learns": {
        **{"schedule": "cosine", "warmup_steps": 10, "ema": 0.98, "checkpointing": False},
    },
    "Watch": {"sample_every": 0},
    "Train": {"steps": 220, "batch_size": 16, "learning_rate": 1e-3, "output_name": "straight_digits"},
    "Positive": {"text": "a handwritten three"},
    "Size and batch": {"width": 64, "height": 64, "batch_size": 4},
    "Before": {"cfg": 3.0},
    "How straight, before": {"cfg": 3.0},
}
"""The same for the template reflow, without the checkpoint."""

logger = logging.getLogger(__name__)


def demo(cache: Path, out: Path, quality: str = "demo") -> tuple[Path, Path, Path]:
    """Runs the demo and returns the paths of its three pictures: of the prior itself, of finetuning and of reflow.

    Args:
        cache: where the tiny prior is kept between runs, and everything else of the demo.
        out: folder of the pictures and the LoRAs.
        quality: of the prior, one of DIGITS.

    Raises:
        SystemExit: a workflow failed; the runner has said why.
    """
    models, work = cache / "models", cache / "demo"
    prior = tiny_prior.ensure_narrow(quality, models).name
    shutil.rmtree(work, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    first = untrained(models, work, out, prior)
    print(f"{first}\n  the prior in 25, 8, 4 and 2 steps, nothing trained yet; finetuning is next", flush=True)
    return first, finetuned(models, work, out, prior, quality), reflowed(models, work, out, prior, quality)


def untrained(models: Path, work: Path, out: Path, prior: str) -> Path:
    """Draws a checkpoint as it is in few steps, which needs no training: something to see early; the picture."""
    _run("finetune_and_sample", models, work, {**GOLDEN, "Checkpoint": {"ckpt_name": prior}}, only=["Save before"])
    return Path(shutil.copy2(_newest(work / "output" / "finetune", "before"), out / "base.png"))


def finetuned(models: Path, work: Path, out: Path, prior: str, quality: str) -> Path:
    """Finetunes a checkpoint on golden digits; the picture."""
    digits.write(work / "input" / GOLDEN["Images and captions"]["folder"], STYLE, IMAGES)
    lora = _trained("finetune_and_sample", models, work, out, {**GOLDEN, "Checkpoint": {"ckpt_name": prior}}, quality)
    before, after, loss = (_picture(work / "output" / "finetune", name) for name in ("before", "after", "loss"))
    rows = (Row("Base", ("as loaded",), before), Row("Finetuned", ("with the LoRA",), after))
    return compose("Diff2Flow: a tiny prior learns a new style", rows, [loss], lora, out / "demo.png")


def reflowed(models: Path, work: Path, out: Path, prior: str, quality: str) -> Path:
    """Makes a checkpoint's paths straight; the picture."""
    (work / "input").mkdir(parents=True, exist_ok=True)
    lora = _trained("reflow", models, work, out, {**STRAIGHT, "Checkpoint": {"ckpt_name": prior}}, quality)
    kinds = ("before", "after")
    grids, plots = (
        [_picture(work / "output" / "reflow", f"{name}{kind}") for kind in kinds] for name in ("", "straightness_")
    )
    rows = (
        Row("Base", ("CFG 3, two network", "calls a step"), grids[0]),
        Row("Reflowed", ("CFG 1, one network", "call a step"), grids[1]),
    )
    return compose("Reflow: the same noise, in 1, 2, 4, 8 and 25 steps", rows, plots, lora, out / "reflow.png")


def _trained(template: str, models: Path, work: Path, out: Path, changes: Changes, quality: str) -> Path:
    """Runs a template on the prior as narrow as it was trained; its LoRA, as the wide prior takes it, is kept twice."""
    made = _fresh(models, changes)
    _run(template, models, work, changes)
    lora = widen_file(made, out / made.name, tiny_prior.QUALITIES[quality])
    shutil.copy2(lora, made)
    return lora


def _fresh(models: Path, changes: Changes) -> Path:
    """Path of the LoRA that a run makes; those of earlier runs are removed."""
    name = changes["Train"]["output_name"]
    for old in (models / "loras").glob(f"{name}*.safetensors"):
        old.unlink()
    return models / "loras" / f"{name}.safetensors"


def _run(template: str, models: Path, work: Path, changes: Changes, only: Sequence[str] = ()) -> None:
    folders = ["--models", str(models), "--input", str(work / "input"), "--output", str(work / "output")]
    settings = [
        f"{title}.{name}={json.dumps(value)}" for title, inputs in changes.items() for name, value in inputs.items()
    ]
    told = [part for setting in settings for part in ("--set", setting)]
    told += [part for title in only for part in ("--only", title)]
    code = run_command(["run", str(WORKFLOWS / f"{template}.json"), *folders, *told])
    if code:
        raise SystemExit(code)


def _picture(folder: Path, prefix: str) -> Image.Image:
    return Image.open(_newest(folder, prefix)).convert("RGB")


def _newest(folder: Path, prefix: str) -> Path:
    return max(folder.glob(f"{prefix}_0*.png"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diff2flow_nodes.bench.demo", description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where the tiny prior is kept (.cache)")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo", help="folder of the picture")
    parser.add_argument(
        "--quality", choices=DIGITS, default="demo",
        help="of the tiny prior: 'digits' trains for three times as long and draws better (%(default)s)",
    )  # fmt: skip
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.monotonic()
    first, finetuning, reflow = demo(options.cache, options.out, options.quality)
    print(
        f"\n{first}\n  base\n{finetuning}\n"
        f"  above: base, below: finetuned\n{reflow}\n  above: base, below: reflowed, equal seeds\n"
        f"The demo took {time.monotonic() - began:.0f} s."
    )


if __name__ == "__main__":
    main()
