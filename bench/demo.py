"""`make demo`: the tiny prior, a finetuning and a reflow, headless, and a picture of each that shows what it did."""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from pathlib import Path

from PIL import Image

from ..cli import main as run_command
from . import demo_picture, digits, tiny_prior
from .wide_lora import widen_file

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "example_workflows" / "api"
STEPS = (25, 8, 4, 2)
STYLE, IMAGES, LORA = "golden", 40, "golden_digits"
STRAIGHT = "straight_digits"

logger = logging.getLogger(__name__)


def demo(cache: Path, out: Path) -> tuple[Path, Path]:
    """Runs the demo and returns the paths of its two pictures, of finetuning and of reflow.

    Args:
        cache: where the tiny prior is kept between runs, and everything else of the demo.
        out: folder of the pictures and the LoRAs.

    Raises:
        SystemExit: a workflow failed; the runner has said why.
    """
    models, work = cache / "models", cache / "demo"
    tiny_prior.ensure("demo", models)
    shutil.rmtree(work, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    return finetuned(models, work, out), reflowed(models, work, out)


def finetuned(models: Path, work: Path, out: Path) -> Path:
    """Finetunes on golden digits; the picture."""
    _forget(models, LORA)
    digits.write(work / "input" / LORA, STYLE, IMAGES)
    _run("finetune_and_sample.json", models, work)
    return _picture(work / "output" / "finetune", models / "loras" / f"{LORA}.safetensors", out)


def reflowed(models: Path, work: Path, out: Path) -> Path:
    """Makes the paths straight, on the prior as narrow as it was trained; the LoRA as the wide one takes it, too."""
    narrow = tiny_prior.ensure_narrow("demo", models)
    _forget(models, STRAIGHT)
    (work / "input").mkdir(parents=True, exist_ok=True)
    _run("reflow.json", models, work, f"Checkpoint.ckpt_name={narrow.name}")
    made = models / "loras" / f"{STRAIGHT}.safetensors"
    lora = widen_file(made, out / made.name, tiny_prior.QUALITIES["demo"])
    shutil.copy2(lora, made)
    kinds = ("before", "after")
    grids, plots = (
        [_newest(work / "output" / "reflow", f"{name}{kind}") for kind in kinds] for name in ("", "straightness_")
    )
    return demo_picture.compose_reflow(grids, plots, lora, out / "reflow.png")


def _forget(models: Path, lora: str) -> None:
    for old in (models / "loras").glob(f"{lora}*.safetensors"):
        old.unlink()


def _run(workflow: str, models: Path, work: Path, *changes: str) -> None:
    folders = ["--models", str(models), "--input", str(work / "input"), "--output", str(work / "output")]
    code = run_command(["run", str(WORKFLOWS / workflow), *folders, *(part for c in changes for part in ("--set", c))])
    if code:
        raise SystemExit(code)


def _picture(samples: Path, lora: Path, out: Path) -> Path:
    """Composes the picture from the files that the workflow saved; copies the LoRA beside it."""
    rows = {kind: {steps: _opened(samples, f"{kind}_{steps}_steps") for steps in STEPS} for kind in ("base", "tuned")}
    shutil.copy2(lora, out / lora.name)
    loss = _opened(samples, "loss")[0]
    picture = out / "demo.png"
    demo_picture.compose(rows["base"], rows["tuned"], loss, lora, picture)
    return picture


def _newest(folder: Path, prefix: str) -> Image.Image:
    return Image.open(max(folder.glob(f"{prefix}_0*.png"))).convert("RGB")


def _opened(folder: Path, prefix: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob(f"{prefix}_*.png"))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diff2flow_nodes.bench.demo", description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where the tiny prior is kept (.cache)")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo", help="folder of the picture")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.monotonic()
    finetuning, reflow = demo(options.cache, options.out)
    print(
        f"\n{finetuning}\n  above: base, below: finetuned\n{reflow}\n  above: base, below: reflowed, equal seeds\n"
        f"The demo took {time.monotonic() - began:.0f} s."
    )


if __name__ == "__main__":
    main()
