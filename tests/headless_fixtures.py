"""Tiny checkpoints in the layout of Stable Diffusion's single files, and workflows that use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..bench import ldm_layout, text_weights
from ..bench.tiny_taesd import block_mean_autoencoder

CONTEXT = {"SD1": 768, "SD2": 1024, "SDXL": 128}
SDXL_TEXT = (64, 64)
"""Widths of SDXL's two text encoders here, 768 and 1280 in earnest: they make its context and its pooled text."""


def make_checkpoint(
    path: Path,
    family: str = "SD1",
    channels: tuple[int, ...] = (32,),
    attended: tuple[bool, ...] | None = None,
    in_channels: int = 4,
    vae: str = "taesd",
    text: bool = True,
    markers: tuple[str, ...] = (),
) -> Path:
    """Writes a checkpoint with seeded random weights: one resnet a block, `attended` levels with attention.

    The autoencoder is none, kl or taesd of random weights, whose latents hardly depend on the image, or of block means.
    SDXL's text encoders are far narrower than the real ones.
    """
    torch.manual_seed(0)
    attended = attended or (True,) * len(channels)
    text_prefix = ldm_layout.SDXL_TEXT_PREFIX if family == "SDXL" else ldm_layout.TEXT_PREFIX
    state = ldm_layout.checkpoint(
        ldm_layout.unet_to_ldm(unet_weights(family, channels, attended, in_channels), blocks=1),
        _VAES[vae](),
        text_encoder_weights(family) if text else {},
        text_prefix,
    )
    state |= {marker: torch.zeros(0) for marker in markers}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path))
    return path


def unet_weights(
    family: str, channels: tuple[int, ...], attended: tuple[bool, ...], in_channels: int = 4
) -> dict[str, Tensor]:
    """diffusers' state dict of a small UNet with seeded weights."""
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        attention_head_dim=8,
        cross_attention_dim=CONTEXT[family],
        use_linear_projection=family != "SD1",
        **(SDXL_UNET if family == "SDXL" else {}),
    )
    return module.state_dict()


SDXL_UNET = {
    "transformer_layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": SDXL_TEXT[1] + 6 * 256,
}
"""What diffusers' UNet takes beside, for SDXL."""


@lru_cache(maxsize=3)
def text_encoder_weights(family: str) -> Mapping[str, Tensor]:
    """Two random layers (SDXL: three); the vocabulary is whole, so this is the largest part of the file."""
    if family == "SDXL":
        return text_weights.sdxl(0, layers=(3, 3), widths=SDXL_TEXT)
    return text_weights.clip_l(0, layers=2) if family == "SD1" else text_weights.open_clip_h(0, layers=2)


def tiny_vae_weights() -> dict[str, Tensor]:
    """A random TAESD in ComfyUI's names."""
    from diffusers import AutoencoderTiny

    state = AutoencoderTiny().state_dict()
    return ldm_layout.taesd_to_comfy(state, torch.tensor(0.18215), torch.tensor(0.1))


def block_mean_weights() -> dict[str, Tensor]:
    """A TAESD whose latents are means of the image's blocks."""
    return ldm_layout.taesd_to_comfy(block_mean_autoencoder(0).state_dict(), torch.tensor(0.18215), torch.tensor(0.0))


def kl_weights(width: int = 32, levels: int = 4) -> dict[str, Tensor]:
    """A random autoencoder in LDM names: one resnet a level, all levels equally wide."""
    state: dict[str, Tensor] = {}
    for half, ends in (("encoder", (3, 8)), ("decoder", (4, 3))):
        _conv(state, f"{half}.conv_in", ends[0], width)
        side, change = ("down", "downsample") if half == "encoder" else ("up", "upsample")
        for level in range(levels):
            for block in range(1 if half == "encoder" else 2):
                _resnet(state, f"{half}.{side}.{level}.block.{block}", width)
            if level < levels - 1 if half == "encoder" else level > 0:
                _conv(state, f"{half}.{side}.{level}.{change}.conv", width, width)
        _resnet(state, f"{half}.mid.block_1", width)
        _resnet(state, f"{half}.mid.block_2", width)
        _norm(state, f"{half}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            _conv(state, f"{half}.mid.attn_1.{part}", width, width, size=1)
        _norm(state, f"{half}.norm_out", width)
        _conv(state, f"{half}.conv_out", width, ends[1])
    _conv(state, "quant_conv", 8, 8, size=1)
    _conv(state, "post_quant_conv", 4, 4, size=1)
    return state


def _resnet(state: dict[str, Tensor], name: str, width: int) -> None:
    for part in ("1", "2"):
        _norm(state, f"{name}.norm{part}", width)
        _conv(state, f"{name}.conv{part}", width, width)


def _norm(state: dict[str, Tensor], name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(width), torch.zeros(width)


def _conv(state: dict[str, Tensor], name: str, inputs: int, outputs: int, size: int = 3) -> None:
    state[f"{name}.weight"] = torch.randn(outputs, inputs, size, size) * (inputs * size * size) ** -0.5
    state[f"{name}.bias"] = torch.zeros(outputs)


_VAES = {"taesd": tiny_vae_weights, "means": block_mean_weights, "kl": kl_weights, "none": dict}


def text_to_image(**changes: Any) -> dict[str, Any]:
    """The usual workflow over "tiny.safetensors"; `changes` are inputs of the KSampler."""
    sampler = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": {"class_type": "KSampler", "inputs": {**sampler, **links, **changes}, "_meta": {"title": "My sampler"}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.3) digit", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "test/picture"}},
    }


def run_cli(folder: Path, workflow: Mapping[str, Any] | str, *options: str) -> subprocess.CompletedProcess[str]:
    """python -m diff2flow_nodes run, in a process of its own, with models, input and output under `folder`."""
    file = folder / "workflow_api.json"
    file.write_text(workflow if isinstance(workflow, str) else json.dumps(workflow))
    folders = [f"--{name}={folder / name}" for name in ("models", "input", "output")]
    package, _, _ = __package__.rpartition(".")
    command = [sys.executable, "-m", package, "run", str(file), *folders, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
