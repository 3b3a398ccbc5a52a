"""Random LoRAs of every kind of layer, for the tests of what is shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

METADATA = {
    "modelspec.title": "ink",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.resolution": "64x64",
    "sshs_model_hash": "abc",
    "diff2flow.version": "1",
    "diff2flow.task": "text_to_image",
    "diff2flow.objective": "diff2flow",
    "diff2flow.start": "terminal",
    "diff2flow.t_range": "0.0640425,1",
    "diff2flow.zero_terminal_snr": "false",
    "diff2flow.recommended_steps": "4",
    "diff2flow.recommended_cfg": "1",
}
_FIRST, _LAST = "input_blocks.0.0", "out.2"


def random_lora(model: Any, clip: Any = None) -> dict[str, Tensor]:
    """LoRA on all linear and convolution layers (every third a DoRA), the first and last trained in full."""
    draw = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    module = model.base.weights.module
    for number, (name, path) in enumerate(sorted(model.base.ldm_names.items())):
        weight, key = module.get_submodule(path).weight, f"lora_unet_{name.replace('.', '_')}"
        if name in (_FIRST, _LAST):
            state[f"{key}.diff"] = torch.randn(weight.shape, generator=draw) * 0.1
            state[f"{key}.diff_b"] = torch.randn(weight.shape[0], generator=draw) * 0.1
        elif weight.ndim > 1:
            state |= _layer(key, weight, draw, dora=number % 3 == 0)
    for path, name in _text_layers(clip).items():
        state |= _layer(name, clip.weights.module.get_submodule(path).weight, draw)
    return state


def _text_layers(clip: Any) -> dict[str, str]:
    """The text encoders' layers with one of the names that files use for them."""
    names = {} if clip is None else clip.layer_names()
    return {path: name for name, path in names.items() if name.startswith(("lora_te_", "lora_te1_", "lora_te2_"))}


def _layer(key: str, weight: Tensor, draw: torch.Generator, dora: bool = False) -> dict[str, Tensor]:
    outputs, inputs, *kernel = weight.shape
    layer = {
        f"{key}.lora_down.weight": torch.randn(2, inputs, *kernel, generator=draw) * 0.1,
        f"{key}.lora_up.weight": torch.randn(outputs, 2, *[1] * len(kernel), generator=draw) * 0.1,
        f"{key}.alpha": torch.tensor(1.5),
    }
    if dora:
        layer[f"{key}.dora_scale"] = torch.rand(outputs, *[1] * (weight.ndim - 1), generator=draw) + 0.5
    return layer
