"""Text embeddings of unequal length in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def padded(contexts: Sequence[Tensor], empty: Callable[[], Tensor]) -> Tensor:
    """Contexts as one batch (B, tokens, width), the shorter ones continued as their encoder continues a short prompt.

    Encoders read a prompt in chunks of 77 tokens, each for itself, and fill missing chunks with the empty prompt's: so
    what is appended is the empty prompt's context. Contexts of one length stay what they are, bit for bit. Repeating
    them to a common multiple instead would leave attention as it is, but 4, 5, 6 and 7 chunks would make 420.

    Args:
        contexts: (1, tokens, width) each.
        empty: makes the empty prompt's context (1, tokens, width); called only where lengths differ.
    """
    longest = max(context.shape[1] for context in contexts)
    if all(context.shape[1] == longest for context in contexts):
        return torch.cat(list(contexts))
    nothing = empty()
    return torch.cat([_continued(context, nothing, longest) for context in contexts])


def _continued(context: Tensor, nothing: Tensor, length: int) -> Tensor:
    missing = length - context.shape[1]
    chunks = -(-missing // nothing.shape[1])
    return torch.cat([context, nothing.repeat(1, chunks, 1)[:, :missing]], dim=1)
