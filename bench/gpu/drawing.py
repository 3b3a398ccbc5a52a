"""What the headless host draws in half precision, and that every preset trains with samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...training.layers import PRESETS
from .setting import FULL, FULL_FP32, SLIM, Setting, emptied, node, tf32

_STEPS, _CFG = (25, 4), 7.0
_IMAGES, _PIXELS = 4, 64
"""Of the training with samples."""


def images(setting: Setting) -> None:
    """Images of one checkpoint in fp16 and in fp32 by our sampler: their difference, of 255."""
    counts = (2,) if setting.small else _STEPS
    half, full = (_drawn(setting, name, counts) for name in (FULL, FULL_FP32))
    for steps in counts:
        off = 255 * (half[steps] - full[steps]).abs()
        found = {"mean_of_255": off.mean().item(), "worst_of_255": off.max().item(), "spread": half[steps].std().item()}
        setting.findings.tell(family="SD1.5", side=setting.side("SD1.5"), steps=steps, **found)


def _drawn(setting: Setting, name: str, counts: tuple[int, ...]) -> dict[int, Tensor]:
    """IMAGE (B, H, W, 3) by the number of steps."""
    side, batch = setting.side("SD1.5") // 8, 1 if setting.small else 4
    with emptied(), tf32(False):
        model, clip, vae = setting.host.load_checkpoint(setting.checkpoint(name))
        positive, negative = (setting.host.encode_text(clip, text) for text in ("a cat", ""))
        given = {"model": model, "positive": positive, "negative": negative, "seed": 0, "cfg": _CFG}
        given |= {"solver": "euler", "denoise": 1.0, "start": "auto"}
        found = {}
        for steps in counts:
            latent = {"samples": torch.zeros(batch, 4, side, side)}
            made = node("Diff2FlowSampler", latent_image=latent, steps=steps, **given)[0]
            found[steps] = setting.host.decode_image(vae, made["samples"]).float().cpu()
        setting.findings.tell(checkpoint=name, dtype=str(model.base.dtype))
        del model, clip, vae, given
    return found


def training(setting: Setting) -> None:
    """Every preset trains headless, with samples and validation, on a checkpoint in half precision."""
    model, clip, vae = setting.host.load_checkpoint(setting.checkpoint(SLIM))
    pictures = torch.rand(_IMAGES, _PIXELS, _PIXELS, 3, generator=torch.Generator().manual_seed(0))
    captions = "\n".join(f"a drawing of {i} things" for i in range(_IMAGES))
    data = node("Diff2FlowImages", images=pictures, captions=captions, vae=vae, clip=clip)[0]
    given = {"model": model, "clip": clip, "dataset": data}
    for preset, text in trainings(setting.small):
        what = f"{preset}, text encoder" if text else preset
        about = {"preset": preset, "text_encoder": text}
        setting.findings.case(what, partial(trained, preset, text, vae, **given), **about)


def trainings(small: bool) -> list[tuple[str, bool]]:
    """Presets, and whether the text encoder is trained as well."""
    return [("light", True), ("full", False)] if small else [*((name, False) for name in PRESETS), ("light", True)]


def trained(preset: str, text: bool, vae: Any, **given: Any) -> dict[str, str]:
    """The name of the file that a training of two steps makes, with a sample and a validation on the way.

    Args:
        preset: of Diff2Flow LoRA Config.
        text: whether the text encoder is trained.
        given: model, clip and dataset.
    """
    watch = node(
        "Diff2FlowTrainWatch", vae=vae, clip=given["clip"], prompts="a cat", sample_every=2, sample_steps="1", cfg=3.0,
        width=_PIXELS, height=_PIXELS, seed=0, validate_every=2, held_out_share=0.3,
    )[0]  # fmt: skip
    lora = node("Diff2FlowLoraConfig", preset=preset, rank=8, alpha=8.0, text_encoder=text)[0]
    name = node(
        "Diff2FlowTrain", **given, lora=lora, objective="diff2flow", steps=2, batch_size=2, learning_rate=1e-4, seed=0,
        output_name=f"{preset}_text" if text else preset, resume="new", watch=watch,
    )[1]  # fmt: skip
    return {"saved": name}
