"""The tiny prior's autoencoder (TAESD's architecture): it starts as a plain 8x8 block mean, and is trained from there.

Its networks compute z = encoder(image) and image = decoder(z); in the file, latents are z/scale + shift.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

LATENT_SCALE = 0.18215
"""SD1's factor between the autoencoder's latents and the network's."""
_MIX = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
_RESIDUAL = 0.1
_GREY, _SPREAD = 0.3, 0.33
"""Mean and standard deviation that a latent's colour is taken to have before anything is measured."""
_LIFT = 0.1
_NOISE, _CROP, _MOMENT_WEIGHT = 0.05, 32, 0.01


def block_mean_autoencoder(seed: int) -> AutoencoderTiny:
    """An AutoencoderTiny of seeded random weights with a path laid through it by hand.

    Its latent is, nearly, an 8x8 block's mean red, green, blue and grey, (mean - 0.3)/0.33; its decoder blends
    neighbouring blocks smoothly. What the random rest adds is small.
    """
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoencoderTiny()
    with torch.no_grad():
        for part in (*module.encoder.layers, *module.decoder.layers):
            if hasattr(part, "conv"):
                part.conv[4].weight *= _RESIDUAL
                part.conv[4].bias *= _RESIDUAL
        _lay_encoder(module.encoder.layers)
        _lay_decoder(module.decoder.layers)
    return module.requires_grad_(False).eval()


def _lay_encoder(layers: nn.Sequential) -> None:
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    mean = torch.tensor([0.0, 0.5, 0.5])
    _pass(convolutions[0], torch.eye(3), torch.tensor([0.0, 1.0, 0.0]))
    for convolution in convolutions[1:-1]:
        _pass(convolution, torch.eye(3), mean)
    _pass(convolutions[-1], _MIX / _SPREAD, torch.tensor([0.0, 1.0, 0.0]))
    convolutions[-1].bias[:] = -_GREY / _SPREAD


def _lay_decoder(layers: nn.Sequential) -> None:
    """The first layer lifts latents above zero, so that they pass the ReLUs; the last takes that back."""
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    blend = torch.tensor([0.25, 0.5, 0.25])
    _pass(convolutions[0], torch.linalg.pinv(_MIX) * _SPREAD, torch.tensor([0.0, 1.0, 0.0]))
    convolutions[0].bias[:3] = _GREY + _LIFT
    for convolution in convolutions[1:-1]:
        _pass(convolution, torch.eye(3), blend)
    _pass(convolutions[-1], torch.eye(3), torch.tensor([0.0, 1.0, 0.0]))
    convolutions[-1].bias[:] = -_LIFT


def _pass(convolution: nn.Conv2d, mix: Tensor, profile: Tensor) -> None:
    """Channel o of the output becomes sum_i mix[o, i] · (input i filtered by profile in both directions)."""
    outputs, inputs = mix.shape
    convolution.weight[:outputs] = 0.0
    convolution.weight[:outputs, :inputs] = mix[..., None, None] * torch.outer(profile, profile)
    if convolution.bias is not None:
        convolution.bias[:outputs] = 0.0


def file_scale(z: Tensor) -> tuple[Tensor, Tensor]:
    """vae_scale and vae_shift such that 0.18215 · (z/scale + shift) has mean 0 and standard deviation 1.

    Args:
        z: (B, 4, h, w), the encoder's output on images of the prior.
    """
    scale = LATENT_SCALE * z.std()
    return scale, -z.mean() / scale


def reconstruction_loss(module: AutoencoderTiny, pictures: Tensor, plain: int, random: torch.Generator) -> Tensor:
    """How wrong pictures come back from latents with a little noise; and how far plain latents are from mean 0, std 1.

    Args:
        pictures: (B, H, W, 3) in [0, 1]; a 32x32 cut of them is trained on.
        plain: how many of them, the first, are of the kind that the prior is trained on.
    """
    top, left = (8 * torch.randint(0, (size - _CROP) // 8 + 1, (2,), generator=random) for size in pictures.shape[1:3])
    top, left = int(top[0]), int(left[1])
    images = pictures.movedim(-1, 1)[..., top : top + _CROP, left : left + _CROP] * 2.0 - 1.0
    z = module.encoder(images)
    noisy = z + _NOISE * torch.randn(z.shape, generator=random)
    error = module.decoder(noisy) - images
    spread, centre = torch.std_mean(z[:plain], dim=(0, 2, 3))
    moments = centre.square() + (spread - 1.0).square()
    return error.abs().mean() + error.square().mean() + _MOMENT_WEIGHT * moments.mean()


@torch.no_grad()
def encode(module: AutoencoderTiny, images: Tensor, batch: int = 32) -> Tensor:
    """z (B, 4, H/8, W/8) of images (B, H, W, 3) in [0, 1]."""
    parts = images.movedim(-1, 1).split(batch)
    return torch.cat([module.encoder(part * 2.0 - 1.0) for part in parts])


@torch.no_grad()
def decode(module: AutoencoderTiny, z: Tensor, batch: int = 32) -> Tensor:
    """Images (B, H, W, 3) in [0, 1] of z (B, 4, H/8, W/8)."""
    images = torch.cat([module.decoder(part) for part in z.split(batch)])
    return (images / 2.0 + 0.5).clamp(0.0, 1.0).movedim(1, -1)
