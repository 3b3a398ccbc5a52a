"""A narrow UNet made wide without changing what it computes: trained at a fraction of the cost, stored at full width.

A channel becomes `copies` equal channels; what reads it shares its weight among them, at random. (The idea is Net2Net,
Chen, Goodfellow, Shlens, 2016.) Group and layer norms see the same means and variances; GEGLU halves stay halves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FREQUENCIES = ("time_embedding.linear_1.weight", "time_embed.0.weight")
"""diffusers' name, and the LDM layout's."""
_ATTENTION = ("to_q.weight", "to_k.weight")
_UNEVEN = 0.5
"""Standard deviation of the logarithm of a copy's share: uneven, so that copies learn different things later on."""


def widened(narrow: Mapping[str, Tensor], wide: Mapping[str, Tensor], copies: int, seed: int) -> dict[str, Tensor]:
    """The wide UNet's state dict that computes what the narrow one does.

    Args:
        narrow: diffusers' state dict of a UNet whose channels are 1/copies of the wide one's.
        wide: the wide UNet's state dict, for its shapes only.
        copies: 1, 2, 5 or 10 for 320 channels: 32 groups must divide the narrow channels.
        seed: of the random shares.

    Raises:
        ValueError: the shapes do not differ by that factor.
    """
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in narrow.items():
        if copies > 1:
            spread = _spread_frequencies if name in _FREQUENCIES else _spread
            value = spread(value, wide[name].shape, copies, random)
            if name.endswith(_ATTENTION):
                value = value * copies**-0.25  # q·k grows by `copies`, the head's 1/sqrt(size) shrinks by sqrt(copies)
        if value.shape != wide[name].shape:
            wanted = tuple(wide[name].shape)
            raise ValueError(f"{name!r} becomes {tuple(value.shape)}, not {wanted}, with {copies} copies")
        state[name] = value
    return state


def narrowed(wide: Mapping[str, Tensor], narrow: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
    """The inverse of `widened`: the narrow UNet's state dict, float32, that computes what the wide one does.

    Args:
        wide: made by `widened` and not trained since; names of diffusers or of the LDM layout.
        narrow: a narrow UNet's state dict, for its shapes only.
        copies: as it was widened with.

    Raises:
        ValueError: the shapes do not differ by that factor.
    """
    state = {}
    for name, like in narrow.items():
        value = wide[name].float()
        if copies > 1:
            value = value[::copies, ::copies] if name in _FREQUENCIES else _gathered(value, like.shape, copies)
            if name.endswith(_ATTENTION):
                value = value * copies**0.25
        if value.shape != like.shape:
            raise ValueError(f"{name!r} becomes {tuple(value.shape)}, not {tuple(like.shape)}, with {copies} copies")
        state[name] = value
    return state


def _gathered(value: Tensor, shape: torch.Size, copies: int) -> Tensor:
    """One of equal outputs; the sum of what equal inputs are weighted with."""
    if value.shape[0] == copies * shape[0]:
        value = value[::copies]
    if value.ndim > 1 and value.shape[1] == copies * shape[1]:
        value = value.unflatten(1, (shape[1], copies)).sum(dim=2)
    return value


def _spread(value: Tensor, shape: torch.Size, copies: int, random: torch.Generator) -> Tensor:
    if shape[0] == copies * value.shape[0]:
        value = value.repeat_interleave(copies, dim=0)
    if value.ndim > 1 and shape[1] == copies * value.shape[1]:
        shares = torch.randn(*value.shape[:2], copies, generator=random).mul(_UNEVEN).softmax(dim=2).flatten(1)
        value = value.repeat_interleave(copies, dim=1) * shares.reshape(*shares.shape, *[1] * (value.ndim - 2))
    return value


def _spread_frequencies(value: Tensor, shape: torch.Size, copies: int, random: torch.Generator) -> Tensor:
    """The first time layer reads sines and cosines; the narrow one's are every copies-th of the wide one's."""
    full = value.new_zeros(value.shape[0], shape[1])
    full[:, ::copies] = value
    return full.repeat_interleave(copies, dim=0)
