"""What sampling costs over the bare network calls, in ComfyUI: ours and the stock KSampler, in one interleaved run.

COMFYUI_DIR=path/to/ComfyUI path/to/its/python bench/sampling_cost.py CHECKPOINT [ROUNDS STEPS] > cost.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comfy_process import arguments, pack  # noqa: E402  (first: it starts ComfyUI)
from costs import cpu_seconds, interleaved, machine, medians, ratios  # noqa: E402

# isort: split
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402

CFG = 4.0
SIZES = ((1, 16), (4, 8))
"""Batch and latent side."""


def measure(model: Any, positive: Any, negative: Any, batch: int, side: int, rounds: int, steps: int) -> dict[str, Any]:
    """Median CPU seconds of each way over interleaved rounds, and the median of its ratios to the bare calls."""
    latent = {"samples": torch.zeros(batch, 4, side, side)}
    network = model.model.diffusion_model
    x = torch.randn(2 * batch, 4, side, side)
    context = torch.cat([positive[0][0], negative[0][0]]).repeat_interleave(batch, 0)
    taus = torch.linspace(999, 0, steps)
    ours, ksampler = pack.NODE_CLASS_MAPPINGS["Diff2FlowSampler"](), stock.KSampler()

    def bare() -> None:
        for tau in taus:
            network(x, tau.expand(2 * batch), context=context, transformer_options={})

    ways: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "ours": lambda: ours.sample(model, positive, negative, latent, 1, steps, CFG, "euler", 1.0, "auto"),
        "ksampler": lambda: ksampler.sample(model, 1, steps, CFG, "euler", "normal", positive, negative, latent, 1.0),
    }
    seconds = interleaved({name: cpu_seconds(way) for name, way in ways.items()}, rounds)
    return {"batch": batch, "latent": side, "median_cpu_seconds": medians(seconds), **ratios(seconds, "bare")}


def main() -> None:
    checkpoint = Path(arguments[0])
    rounds, steps = (int(number) for number in arguments[1:3] or (5, 4))
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        model, clip, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a three", ""))
        comfy.model_management.load_models_gpu([model])
        results = [measure(model, positive, negative, batch, side, rounds, steps) for batch, side in SIZES]
    about = {"steps": steps, "cfg": CFG, "rounds": rounds, **machine()}
    print(json.dumps({**about, "results": results}, indent=2))


if __name__ == "__main__":
    main()
