"""Pictures drawn by prompt: the narrow network with the project's own Euler steps along the aligned flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import tiny_taesd, tiny_unet
from . import captions, grids, words
from .stored import Prior

PROMPTS = (
    "fluent style, red heart",
    "noto style, dog face",
    "twemoji style, rocket",
    "fluent style, owl",
    "noto style, avocado",
    "twemoji style, grinning face",
    "fluent style, castle",
    "noto style, sunflower",
    "twemoji style, bicycle",
    "fluent style, guitar",
    "noto style, soccer ball",
    "twemoji style, woman dancing",
    "fluent style, hamburger",
    "noto style, octopus",
    "twemoji style, house",
    "fluent style, sleeping face",
)
_BATCH, _SHAPE = 64, (4, 16, 16)


@torch.no_grad()
def drawn(prior: Prior, prompts: Sequence[str], seeds: Sequence[int], steps: int, cfg: float) -> Tensor:
    """Pictures (B, 128, 128, 3) in [0, 1].

    Args:
        prompts: B captions.
        seeds: B, of the noise.
    """
    context = prior.network.words(captions.padded(prompts, words.LENGTH))
    empty = prior.network.words(captions.padded([""], words.LENGTH))
    noise = torch.stack([torch.randn(*_SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    parts = [
        tiny_unet._sampled(prior.network, x_noise, part, empty, steps, cfg)  # type: ignore[arg-type]
        for x_noise, part in zip(noise.split(_BATCH), context.split(_BATCH), strict=True)
    ]
    return tiny_taesd.decode(prior.autoencoder, torch.cat(parts).float() * prior.std + prior.mean)


def grid(prior: Prior, prompts: Sequence[str], first: int, count: int, steps: int, cfg: float) -> Tensor:
    """(rows · 128, count · 128, 3): a row for each prompt, a column for each of consecutive seeds.

    Args:
        first: seed of the first column.
        count: columns.
    """
    seeds = list(range(first, first + count)) * len(prompts)
    pictures = drawn(prior, [prompt for prompt in prompts for _ in range(count)], seeds, steps, cfg)
    return grids.rows(pictures, count)
