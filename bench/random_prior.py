"""Checkpoints with seeded random weights, made in seconds: for tests of both hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole
from . import ldm_layout, text_weights
from .tiny_taesd import LATENT_SCALE, block_mean_autoencoder
from .tiny_unet import fit_last_layer, random_unet, unet_config

_V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.2
"""ComfyUI takes a full SD2 network for v prediction where this bias spreads wider than 0.09."""
_SDXL_LATENT_SCALE = 0.13025


def build_random(
    path: Path,
    levels: int = 1,
    blocks: int = 1,
    family: str = "SD1",
    prediction: str = "eps",
    in_channels: int = 4,
    seed: int = 0,
    text_layers: int | None = None,
    width: int = 320,
    device: str = "cpu",
) -> Path:
    """Writes a single-file checkpoint of random weights, float16; its samples are blurred colours.

    Args:
        path: the .safetensors file; written whole or not at all.
        levels, blocks, family, in_channels: of the UNet, see `unet_config`; 1, 1, SD1 and 4 make 26 M parameters. 3, 2
            and SDXL make Segmind Vega, 745 M: the file is 3.1 GB, building it takes a minute and 5 GB of memory.
        prediction: "eps" or "v"; "v" adds the marker `v_pred`, which ComfyUI heeds in full SDXL files only.
        text_layers: of the text encoders; None: all (SD1: 12, 250 MB; SD2: 24, 700 MB; SDXL: 12 and 32, 1.6 GB), which
            ComfyUI wants.
        width: channels of the UNet's first level; ComfyUI wants 320.
        device: that the UNet is made on: full-size ones take a minute on a CPU. Its weights are others on a GPU.

    Raises:
        ValueError: unknown family or prediction, or levels out of range.
    """
    from safetensors.torch import save_file

    if prediction not in ("eps", "v"):
        raise ValueError(f"prediction {prediction!r} is neither 'eps' nor 'v'")
    weights = _random_unet(unet_config(levels, blocks, family, in_channels, width), prediction, seed, device)
    text_prefix = ldm_layout.SDXL_TEXT_PREFIX if family == "SDXL" else ldm_layout.TEXT_PREFIX
    text = _random_text(family, seed, text_layers)
    state = ldm_layout.checkpoint(weights, _random_vae(family, seed), text, text_prefix)
    if prediction == "v":
        state["v_pred"] = torch.zeros(0)
    with written_whole(Path(path)) as temporary:
        save_file(state, str(temporary), metadata={"diff2flow.tiny_prior": f"random seed {seed}"})
    return Path(path)


def _random_unet(config: dict[str, Any], prediction: str, seed: int, device: str) -> dict[str, Tensor]:
    unet = random_unet(config, seed, device)
    fit_last_layer(unet, prediction, seed)
    weights = ldm_layout.unet_to_ldm(unet.state_dict(), config["layers_per_block"])
    if prediction == "v" and _V_BIAS in weights:
        spread = torch.Generator().manual_seed(seed)
        weights[_V_BIAS].copy_(torch.empty(weights[_V_BIAS].shape).normal_(0.0, _V_SPREAD, generator=spread))
    return _half(weights)


def _random_text(family: str, seed: int, layers: int | None) -> dict[str, Tensor]:
    if family == "SDXL":
        return text_weights.sdxl(seed) if layers is None else text_weights.sdxl(seed, (layers, layers))
    make = text_weights.clip_l if family == "SD1" else text_weights.open_clip_h
    return make(seed) if layers is None else make(seed, layers)


def _random_vae(family: str, seed: int) -> dict[str, Tensor]:
    module = block_mean_autoencoder(seed)
    scale = _SDXL_LATENT_SCALE if family == "SDXL" else LATENT_SCALE
    return ldm_layout.taesd_to_comfy(module.state_dict(), torch.tensor(scale), torch.tensor(0.0))


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() for key, value in state.items()}
