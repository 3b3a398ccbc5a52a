"""What sampling costs over the bare network calls, in ComfyUI: ours and the stock KSampler, in one interleaved run.

    COMFYUI_DIR=path/to/ComfyUI path/to/its/python bench/sampling_cost.py CHECKPOINT [ROUNDS STEPS] [--device cuda]

CPU seconds on the CPU, the GPU's own on a GPU, there with dynamic VRAM as ComfyUI's main.py starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comfy_process import DEVICE, arguments, dynamic_vram, pack  # noqa: E402  (first: it starts ComfyUI)
from costs import interleaved, machine, medians, ratios, seconds_on  # noqa: E402

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
    """Median seconds of each way over interleaved rounds, and the median of its ratios to the bare calls."""
    latent = {"samples": torch.zeros(batch, 4, side, side)}
    ours, ksampler = pack.NODE_CLASS_MAPPINGS["Diff2FlowSampler"](), stock.KSampler()
    ways: dict[str, Callable[[], Any]] = {
        "bare": bare_calls(model, positive, negative, batch, side, steps),
        "ours": lambda: ours.sample(model, positive, negative, latent, 1, steps, CFG, "euler", 1.0, "auto"),
        "ksampler": lambda: ksampler.sample(model, 1, steps, CFG, "euler", "normal", positive, negative, latent, 1.0),
    }
    timed = seconds_on(DEVICE)
    seconds = interleaved({name: timed(way) for name, way in ways.items()}, rounds)
    key = "median_cpu_seconds" if DEVICE == "cpu" else "median_seconds"
    return {"batch": batch, "latent": side, key: medians(seconds), **ratios(seconds, "bare")}


def bare_calls(model: Any, positive: Any, negative: Any, batch: int, side: int, steps: int) -> Callable[[], None]:
    """The CFG-batched network calls of a sampling and nothing else, on the network's device and in its dtype."""
    network, device = model.model.diffusion_model, model.load_device
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    x = torch.randn(2 * batch, 4, side, side, device=device, dtype=dtype)
    context = torch.cat([positive[0][0], negative[0][0]]).repeat_interleave(batch, 0).to(device, dtype)
    taus = torch.linspace(999, 0, steps, device=device)

    def calls() -> None:
        comfy.model_management.load_models_gpu([model])
        for tau in taus:
            network(x, tau.expand(2 * batch), context=context, transformer_options={})

    return calls


def main() -> None:
    checkpoint = Path(arguments[0])
    numbers = [int(number) for number in arguments[1:3] if number.isdecimal()]
    rounds, steps = numbers or (5, 4)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        model, clip, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a three", ""))
        results = [measure(model, positive, negative, batch, side, rounds, steps) for batch, side in SIZES]
    about = {"device": DEVICE, "dynamic_vram": dynamic_vram(), **machine()}
    about |= {"steps": steps, "cfg": CFG, "rounds": rounds}
    print(json.dumps({**about, "results": results}, indent=2))


if __name__ == "__main__":
    main()
