"""`make demo`: the tiny prior, a finetuning headless, and one picture that shows what it did."""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from pathlib import Path

from PIL import Image

from ..cli import main as run_command
from . import demo_picture, digits, tiny_prior

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows" / "api" / "finetune_and_sample.json"
STEPS = (25, 8, 4, 2)
STYLE, IMAGES, LORA = "golden", 40, "golden_digits"

logger = logging.getLogger(__name__)


def demo(cache: Path, out: Path) -> Path:
    """Runs the demo and returns the picture's path.

    Args:
        cache: where the tiny prior is kept between runs, and everything else of the demo.
        out: folder of the picture, the loss plot and the LoRA.

    Raises:
        SystemExit: the workflow failed; the runner has said why.
    """
    models, images = cache / "models", cache / "demo"
    tiny_prior.ensure("demo", models)
    shutil.rmtree(images, ignore_errors=True)
    for old in (models / "loras").glob(f"{LORA}*.safetensors"):
        old.unlink()
    digits.write(images / "input" / LORA, STYLE, IMAGES)
    folders = ["--models", str(models), "--input", str(images / "input"), "--output", str(images / "output")]
    code = run_command(["run", str(WORKFLOW), *folders])
    if code:
        raise SystemExit(code)
    return _picture(images / "output" / "finetune", models / "loras" / f"{LORA}.safetensors", out)


def _picture(samples: Path, lora: Path, out: Path) -> Path:
    """Composes the picture from the files that the workflow saved; copies the LoRA beside it."""
    rows = {kind: {steps: _opened(samples, f"{kind}_{steps}_steps") for steps in STEPS} for kind in ("base", "tuned")}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(lora, out / lora.name)
    loss = _opened(samples, "loss")[0]
    picture = out / "demo.png"
    demo_picture.compose(rows["base"], rows["tuned"], loss, lora, picture)
    return picture


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
    picture = demo(options.cache, options.out)
    print(f"\n{picture}\nThe demo took {time.monotonic() - began:.0f} s. Above: base, below: finetuned.")


if __name__ == "__main__":
    main()
