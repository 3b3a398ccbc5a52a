"""Blocks of a network that forget their activations and compute them again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
Told = Callable[[Callable[[], Any]], None]
_told: ContextVar[Told | None] = ContextVar("told", default=None)


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


@contextmanager
def each_told(tell: Told) -> Iterator[None]:
    """While the context lasts, every block that is called is first handed over, as a call that keeps its activations:
    the backward pass makes the same one."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


def _twice(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    from torch.utils.checkpoint import checkpoint

    tell = _told.get()
    if tell is not None:
        tell(partial(forward, *args, **kwargs))
    # Nothing in these blocks draws random numbers: dropout is 0 in every Stable Diffusion UNet.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
