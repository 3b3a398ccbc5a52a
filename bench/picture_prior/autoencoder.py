"""The prior's autoencoder: TAESD's layout at half its width, trained on the moved pictures; widened for the file.

Its networks compute z = encoder(image) and image = decoder(z), with z of mean 0 and standard deviation 1, nearly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from .. import tiny_taesd
from ..short_training import Plan
from ..widen import widened
from .data import Pictures, load
from .grids import rows
from .long_training import LongTraining
from .moving import Motion, cut, moved, recoloured

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

WIDTH, WIDE = 32, 64
"""Channels that are trained, and TAESD's."""
PLAN = Plan(steps=2000, rate=2e-3, warm_up=50, average=0.995, save_every=120.0)
_BATCH, _CUT = 12, 64
_MOTION = Motion(turn=15.0, smallest=0.6, largest=1.1, shift=0.15)
_RECOLOURED = 0.2
_RESIDUAL, _NOISE, _MOMENTS = 0.1, 0.03, 0.02
_SCALES = 3


def autoencoder(width: int, seed: int = 0) -> AutoencoderTiny:
    """An AutoencoderTiny of random weights with a block mean laid through it, so that it starts as a coarse copy."""
    from diffusers import AutoencoderTiny

    channels = (width,) * 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels)
    with torch.no_grad():
        for part in (*module.encoder.layers, *module.decoder.layers):
            if hasattr(part, "conv"):
                part.conv[4].weight *= _RESIDUAL
                part.conv[4].bias *= _RESIDUAL
        tiny_taesd._lay_encoder(module.encoder.layers)
        tiny_taesd._lay_decoder(module.decoder.layers)
    return module.requires_grad_(False).eval()


def wide_state(narrow: AutoencoderTiny) -> dict[str, Tensor]:
    """The state dict of TAESD's width that computes the same."""
    state = {key: value.float() for key, value in narrow.state_dict().items()}
    return widened(state, autoencoder(WIDE).state_dict(), WIDE // WIDTH, seed=0)


def sharpness_loss(made: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error, plus that of the details on three scales (a Laplacian pyramid), which keeps edges crisp.

    Args:
        made, images: (B, 3, H, W).
    """
    error = made - images
    loss = error.abs().mean()
    for _ in range(_SCALES):
        coarse = functional.avg_pool2d(error, 2)
        loss = loss + (error - functional.interpolate(coarse, scale_factor=2.0)).abs().mean()
        error = coarse
    return loss


def train(pictures: Pictures, work: Path, plan: Plan = PLAN) -> AutoencoderTiny:
    """The autoencoder, trained on the pictures that are not held out; continues where its state was saved.

    Args:
        work: folder of the state, autoencoder_training.safetensors.
    """
    module = autoencoder(WIDTH).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = torch.from_numpy(pictures.pixels)
    mirrored = torch.tensor([picture.mirrored for picture in pictures.about])

    def loss(random: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(pixels), (_BATCH,), generator=random)
        images = cut(moved(pixels[chosen], mirrored[chosen], _MOTION, random), _CUT, random)
        images = recoloured(images, _RECOLOURED, random)
        images = images.contiguous(memory_format=torch.channels_last) * 2.0 - 1.0
        z = module.encoder(images)
        made = module.decoder(z + _NOISE * torch.randn(z.shape, generator=random))
        spread, centre = torch.std_mean(z, dim=(0, 2, 3))
        return sharpness_loss(made, images) + _MOMENTS * (centre.square() + (spread - 1.0).square()).mean()

    training = LongTraining(module, plan, work / "autoencoder_training.safetensors", "1", "autoencoder")
    training.run(loss)
    return training.averaged()


def trained(work: Path) -> AutoencoderTiny:
    """Trains it, or goes on, and writes autoencoder.safetensors (float32)."""
    from safetensors.torch import save_file

    module = train(load(work).chosen(lambda picture: not picture.held_out), work)
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, str(path(work)))
    return module


def path(work: Path) -> Path:
    """Of the trained weights."""
    return work / "autoencoder.safetensors"


def read(work: Path) -> AutoencoderTiny:
    """The trained autoencoder."""
    from safetensors.torch import load_file

    module = autoencoder(WIDTH)
    module.load_state_dict(load_file(str(path(work))))
    return module


def comparison(pictures: Pictures, work: Path, columns: int = 16, count: int = 4) -> Tensor:
    """Rows of held-out pictures, each row above what the autoencoder makes of it: an image (H, W, 3).

    Args:
        columns: pictures a row.
        count: of such pairs of rows.
    """
    images = pictures.chosen(lambda picture: picture.held_out).images(list(range(0, columns * count * 5, 5)))
    made = tiny_taesd.decode(read(work), tiny_taesd.encode(read(work), images))
    both = torch.stack([images.unflatten(0, (count, columns)), made.unflatten(0, (count, columns))], dim=1)
    return rows(both.flatten(0, 2), columns)
