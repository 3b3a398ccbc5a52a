"""The prior's network, as narrow as it is trained, and as wide as Stable Diffusion's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import tiny_unet
from ..widen import widened
from . import words
from .words import Words

WIDTH, WIDE = 64, 320
_ATTENDED_BY_TEXT = ("attn2.to_k.weight", "attn2.to_v.weight")
_MASK_SCALE = 10000.0
"""What diffusers multiplies (1 - mask) with, and takes off the attention's logits."""


def config(width: int, context: int) -> dict[str, Any]:
    """Arguments of diffusers' UNet: two resolutions, of which the second has attention."""
    return tiny_unet.unet_config(levels=2, width=width) | {
        "cross_attention_dim": context,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }


class Network(nn.Module):
    """UNet and words together.

    Args:
        tokens: ids that have a row.
        seed: of the first weights.
    """

    def __init__(self, tokens: Any, seed: int = 0) -> None:
        super().__init__()
        self.unet = tiny_unet.random_unet(config(WIDTH, words.SIZE), seed)
        self.words = Words(tokens)
        # the attention's softmax must count the last place as often as it stands for in CLIP's 77
        self.register_buffer("_mask", 1.0 + words.repeats().log() / _MASK_SCALE, persistent=False)

    def forward(self, x: Tensor, tau: Tensor, context: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """(eps,) as diffusers' UNet answers.

        Args:
            x: x_diff (B, 4, h, w).
            tau: timesteps, () or (B,).
            context: (B, 24, 128) of `words`.
        """
        mask = self._mask.expand(len(x), -1)
        return self.unet(x, tau, context, encoder_attention_mask=mask, return_dict=return_dict)


def state_for_clip(network: Network, width: int = WIDE) -> dict[str, Tensor]:
    """The UNet's state dict with CLIP-L's context; it computes the same.

    Args:
        width: channels of the first resolution, 320 as ComfyUI wants, or 64 as trained, which headless loads as well.
    """
    narrow = {key: value.float().cpu() for key, value in network.unet.state_dict().items()}
    for key in narrow:
        if key.endswith(_ATTENDED_BY_TEXT):
            narrow[key] = words.widened_reader(narrow[key])
    with torch.device("meta"):
        wide = tiny_unet.random_unet(config(width, words.CLIP_SIZE), 0).state_dict()
    return widened(narrow, wide, width // WIDTH, seed=0)


def millions(network: nn.Module) -> float:
    """Parameters, in millions."""
    return math.fsum(parameter.numel() for parameter in network.parameters()) / 1e6
