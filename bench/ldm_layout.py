"""Key names of single-file checkpoints: the LDM layout of a UNet, and ComfyUI's layout of a tiny autoencoder.

The maps here go from diffusers' names to those of the file, the opposite direction of what loaders do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."
SDXL_TEXT_PREFIX = "conditioner.embedders."
"""SDXL's two text encoders are called 0 and 1 behind it."""

_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet_to_ldm(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """A diffusers UNet2DConditionModel's state dict with LDM names ("input_blocks.1.0.in_layers.0.weight").

    Args:
        state: diffusers' state dict.
        blocks: its `layers_per_block`, the same on every level.

    Raises:
        ValueError: a key that no UNet of SD1, SD2 or SDXL has.
    """
    matches = [match.groups() for match in map(_BLOCK.match, state) if match]
    attended = {level for side, level, kind, *_ in matches if side == "up" and kind == "attentions"}
    return {_unet_key(key, blocks, attended): value for key, value in state.items()}


def _unet_key(key: str, blocks: int, attended: set[str]) -> str:
    module, _, leaf = key.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    if match := _BLOCK.match(key):
        side, level, kind, index, rest = match.groups()
        return _block_key(side, int(level), kind, int(index), rest, blocks, level in attended)
    if match := _MIDDLE.match(key):
        kind, index, rest = match.groups()
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * int(index)}.{_resnet(rest)}"
    raise ValueError(f"{key!r} is no key of a UNet of SD1, SD2 or SDXL")


def _block_key(side: str, level: int, kind: str, index: int, rest: str, blocks: int, attended: bool) -> str:
    first = level * (blocks + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + blocks + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + blocks}.{2 if attended else 1}.{rest}"
    place = f"input_blocks.{first + index + 1}" if side == "down" else f"output_blocks.{first + index}"
    return f"{place}.1.{rest}" if kind == "attentions" else f"{place}.0.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    module, _, leaf = rest.rpartition(".")
    return f"{_RESNET[module]}.{leaf}"


def taesd_to_comfy(state: Mapping[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """A diffusers AutoencoderTiny's state dict with ComfyUI's TAESD names, which count the decoder's clamp as layer 0.

    Args:
        state: diffusers' state dict ("encoder.layers.N…", "decoder.layers.N…").
        scale, shift: (); the file's latent is z/scale + shift, z being what the encoder puts out.

    Raises:
        ValueError: a key that AutoencoderTiny does not have.
    """
    named = {"vae_scale": scale, "vae_shift": shift}
    for key, value in state.items():
        match = re.match(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", key)
        if not match:
            raise ValueError(f"{key!r} is no key of an AutoencoderTiny")
        half, layer, rest = match.groups()
        named[f"taesd_{half}.{int(layer) + (half == 'decoder')}.{rest}"] = value
    return named


def checkpoint(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor], text_prefix: str = TEXT_PREFIX
) -> dict[str, Tensor]:
    """One file's state dict from the three networks', each with its prefix."""
    parts = ((UNET_PREFIX, unet), (VAE_PREFIX, vae), (text_prefix, text))
    return {prefix + key: value.detach().contiguous() for prefix, part in parts for key, value in part.items()}
