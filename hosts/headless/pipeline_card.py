"""The page (README.md) in an exported folder: how to sample it, and how near that comes to Diff2Flow's own sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...samplers.parameterization import FlowParameterization

_PAGE = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, flow-matching, diff2flow]
---

# {title}

A {family} model of {prediction} prediction{loras}. Its image size is {size}x{size}.

## Sample it

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{folder}", torch_dtype=torch.{dtype})
pipe.to("cuda")  # on the CPU leave this out, and torch_dtype
image = pipe("a prompt", num_inference_steps={steps}, guidance_scale={cfg:g}).images[0]
```

{recommended}: {steps} steps, guidance scale (CFG) {cfg:g}.{unguided}

{steps_section}

Prompts are read without weights: "(word:1.3)" is ComfyUI's notation, not diffusers'.
"""
_EXACT = """\
## The steps that Diff2Flow takes

The scheduler is EulerDiscreteScheduler with trailing timesteps: its steps are Euler's along the flow. Left to itself
it spreads them evenly over the network's timesteps. Diff2Flow spreads them evenly over flow time t, which can be had
here by naming the noise levels sigma = (1 - t)/t:

```python
steps = {steps}
t = torch.linspace({t_min:.7f}, 1.0, steps + 1, dtype=torch.float64)
image = pipe("a prompt", sigmas=((1 - t) / t).tolist(), guidance_scale={cfg:g}).images[0]
```

{start}"""
_TERMINAL = """\
What remains is the size of the first noise: diffusers takes sigma where Diff2Flow takes sqrt(1 + sigma^2), 0.2 % more.
Measured on the project's tiny prior of digits (a reflowed LoRA, CFG 1, latents of 64x64 images; the difference as a
part of the latents' spread): 0.5 % in 1 step, 0.2 % in 2 and in 4 steps with these sigmas; with the scheduler's own
steps 0.5 %, 7 % and 5 %."""
_NOISE = """\
This model was trained to start at pure noise (t = 0), and diffusers can only start at the schedule's last timestep
(t = {t_min:.4f}). So its images are near those of Diff2Flow's own sampler, not equal, and very dark or bright images
may come out less so. Measured on the project's tiny prior of digits (CFG 1, latents of 64x64 images; the difference as
a part of the latents' spread): 10 % in 1 step, 6 % in 2 and in 4 steps with these sigmas; with the scheduler's own
steps 10 %, 8 % and 7 %."""
_ZERO_SNR = """\
## The scheduler

EulerDiscreteScheduler with trailing timesteps: its steps are Euler's along the flow, spread evenly over the network's
timesteps. The schedule ends in pure noise (zero terminal SNR), where the first noise level is infinite; diffusers takes
a very large one instead."""


def card(
    title: str,
    folder: str,
    family: str,
    flow: FlowParameterization,
    loras: Sequence[str],
    recommended: Mapping[str, float],
    size: int,
    dtype: str,
) -> str:
    """The page's text.

    Args:
        title, folder: of the export.
        family: "SD1", "SD2" or "SDXL".
        flow: how it is sampled.
        loras: titles of what was baked in.
        recommended: "steps" and "cfg", where a LoRA recommends them.
        size: of the images, pixels.
        dtype: torch's name of the weights'.
    """
    steps, cfg = int(recommended.get("steps", 25)), float(recommended.get("cfg", 7.0))
    return _PAGE.format(
        title=title,
        folder=folder,
        family={"SD1": "Stable Diffusion 1.x", "SD2": "Stable Diffusion 2.x"}.get(family, family),
        prediction=flow.alignment.prediction,
        loras=f", with {' and '.join(loras)} baked in by Diff2Flow" if loras else "",
        size=size,
        pipeline="StableDiffusionXLPipeline" if family == "SDXL" else "StableDiffusionPipeline",
        dtype=dtype,
        steps=steps,
        cfg=cfg,
        recommended="Recommended" if recommended else "Usual for a model as it is",
        unguided=" At 1 the negative prompt does not count." if cfg <= 1.0 else "",
        steps_section=_steps(flow, steps, cfg),
    )


def _steps(flow: FlowParameterization, steps: int, cfg: float) -> str:
    """How to take the steps that Diff2Flow takes, and what difference remains."""
    if flow.alignment.schedule.is_zero_terminal_snr:
        return _ZERO_SNR
    t_min = flow.alignment.t_range[0]
    start = (_NOISE if flow.start == "noise" else _TERMINAL).format(t_min=t_min)
    return _EXACT.format(steps=steps, cfg=cfg, t_min=t_min, start=start)
