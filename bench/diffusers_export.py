"""How near diffusers' images of an exported folder come to Diff2Flow Sampler's, with and without its own sigmas.

    python -m diff2flow_nodes.bench.diffusers_export --models models --checkpoint tiny_prior.safetensors
        --loras fast.safetensors paper.safetensors --out bench/results/diffusers_export.json

Latents of the same noise and prompts are compared: the root mean square of the difference, as a part of the spread of
Diff2Flow Sampler's latents. CFG and the way of starting are the LoRA's own.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hosts import use
from ..hosts.choice import flow_of
from ..hosts.headless import HeadlessHost
from ..hosts.headless.autoencoder import PREFIX
from ..hosts.headless.pipeline_folder import Pipeline, write_pipeline
from ..hosts.headless.sampling import seeded_noise
from ..nodes.sampling import ATOL, RTOL, sampled
from ..training.checkpoint_file import StoredTensor
from ..training.lora_file import load_lora
from . import ldm_layout
from .runs import write_json
from .tiny_taesd import LATENT_SCALE, block_mean_autoencoder

log = logging.getLogger(__name__)
STEPS = (1, 2, 4, 8, 25)
PROMPTS = tuple(f"a handwritten {word}" for word in ("three", "seven", "zero", "one", "eight", "four"))
SIZE, SEED = 64, 5


def measure(host: HeadlessHost, checkpoint: str, lora: str) -> dict[str, Any]:
    """Differences by the number of steps, for a LoRA on a checkpoint."""
    model, clip, _ = host.load_checkpoint(checkpoint)
    state, metadata = load_lora(host.path("loras", lora))
    model, clip = host.apply_lora(model, clip, state, 1.0, metadata)
    pipe, cfg = exported(host, model, clip), float(metadata["diff2flow.recommended_cfg"])
    found = {}
    for steps in STEPS:
        ours = by_sampler(host, model, clip, steps, cfg)
        ways = {"same sigmas": {"sigmas": flow_of(model.facts).sigmas_k(steps).tolist()},
                "its own steps": {"num_inference_steps": steps}}  # fmt: skip
        latents = {way: by_pipeline(pipe, given, cfg) / model.base.latent_scale for way, given in ways.items()}
        found[str(steps)] = {way: difference(latent, ours) for way, latent in latents.items()}
        log.info("%s, %d steps: %s", lora, steps, found[str(steps)])
    return {"lora": lora, "start": flow_of(model.facts).start, "cfg": cfg, "difference": found}


def exported(host: HeadlessHost, model: Any, clip: Any) -> Any:
    """The pipeline of a model; with another autoencoder, as that of the tiny priors has no place in diffusers."""
    from diffusers import StableDiffusionPipeline

    module = block_mean_autoencoder(0)
    pixels = ldm_layout.taesd_to_comfy(module.state_dict(), torch.tensor(LATENT_SCALE), torch.tensor(0.0))
    vae = host.load_checkpoint(model.base.name)[2]
    tensors = {key: value for key, value in host.checkpoint(model, clip, vae).items() if not key.startswith(PREFIX)}
    tensors |= {PREFIX + key: StoredTensor.of(value) for key, value in pixels.items()}
    with tempfile.TemporaryDirectory() as folder:
        flow = flow_of(model.facts)
        write_pipeline(Path(folder), Pipeline(tensors, host.clip_merges(), flow, torch.float32, SIZE, "prior"))
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_sampler(host: HeadlessHost, model: Any, clip: Any, steps: int, cfg: float) -> Tensor:
    """Diff2Flow Sampler's latents."""
    contexts = torch.cat([host.encode_text(clip, prompt)[0][0] for prompt in PROMPTS])
    nothing = host.encode_text(clip, "")[0][0].expand_as(contexts)
    latent, solver = {"samples": _empty()}, host.solver("euler", RTOL, ATOL)
    return sampled(model, [[contexts, {}]], [[nothing, {}]], latent, SEED, steps, cfg, solver, "auto")["samples"]


def by_pipeline(pipe: Any, steps: dict[str, Any], cfg: float) -> Tensor:
    """diffusers' latents, in the network's scale."""
    noise = seeded_noise(_empty(), SEED, None)
    texts = {"prompt": list(PROMPTS), "negative_prompt": [""] * len(PROMPTS), "guidance_scale": cfg}
    return pipe(**texts, **steps, width=SIZE, height=SIZE, latents=noise, output_type="latent").images


def difference(found: Tensor, ours: Tensor) -> float:
    """Root mean square, as a part of the spread of `ours`."""
    return round(float(((found - ours).square().mean() / ours.var()).sqrt()), 5)


def _empty() -> Tensor:
    return torch.zeros(len(PROMPTS), 4, SIZE // 8, SIZE // 8)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--loras", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    host = HeadlessHost(options.models, options.models, options.models)
    use(host)
    runs = [measure(host, options.checkpoint, lora) for lora in options.loras]
    write_json(options.out, {"checkpoint": options.checkpoint, "samples": len(PROMPTS), "seed": SEED, "runs": runs})


if __name__ == "__main__":
    main()
