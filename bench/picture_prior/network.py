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
_CONSTANT, _QUIET, _LOUD = 0.5, -4.0, 2.0
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
        with torch.no_grad():
            lay_text(self.unet, self.words, torch.Generator().manual_seed(seed))
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


def lay_text(unet: nn.Module, text: Words, random: torch.Generator) -> None:
    """Makes the captions' words heard from the start; all of it can be learned away.

    Most of CLIP's 77 places hold end marks, and attention that is spread evenly would hear little else. So the end mark
    alone lies along the context's first dimension, queries have a constant part (the bias of the norm before them), and
    keys turn the first dimension against it: an end mark's logit is -4, a word's 0. Values are louder as well.

    Args:
        unet: diffusers' UNet of `words.SIZE` wide contexts.
        text: whose rows and positions are changed too.
    """
    text.rows[:, 0] = 0.0
    text.positions[:, 0] = 0.0
    text.rows[words.END_PLACE] = 0.0
    text.rows[words.END_PLACE, 0] = words.SIZE**0.5
    for block in (module for module in unet.modules() if hasattr(module, "attn2")):
        attention, norm = block.attn2, block.norm2
        norm.bias.normal_(0.0, _CONSTANT, generator=random)
        query = (attention.to_q.weight @ norm.bias).unflatten(0, (attention.heads, -1))
        against = _QUIET * query.shape[1] ** 0.5 * query / query.square().sum(dim=1, keepdim=True)
        attention.to_k.weight[:, 0] = against.flatten() / words.SIZE**0.5
        attention.to_v.weight *= _LOUD
        attention.to_out[0].weight *= _LOUD


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
