"""Blocks of a network that forget their activations and compute them again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

BLOCKS = (
    "BasicTransformerBlock",
    "ResnetBlock2D",
    "ResBlock",
)
"""Class names, in diffusers and ComfyUI, of the blocks that are computed twice."""


@contextmanager
def checkpointed(network: nn.Module, on: bool) -> Iterator[None]:
    """The network with its blocks checkpointed while gradients are on; as it was when the context ends.

    Args:
        network: any UNet.
        on: False does nothing.

    Raises:
        ValueError: none of its blocks is known.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in BLOCKS] if on else []
    if on and not blocks:
        raise ValueError("checkpointing: no known block was found in this network; switch it off")
    try:
        for block in blocks:
            block.forward = partial(_twice, block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _twice(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    from torch.utils.checkpoint import checkpoint

    # Nothing in these blocks draws random numbers: dropout is 0 in every Stable Diffusion UNet.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
