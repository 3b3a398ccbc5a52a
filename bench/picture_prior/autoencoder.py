"""The prior's autoencoder: TAESD's layout at half its width, trained on the moved pictures; widened for the file.

Its networks compute z = encoder(image) and image = decoder(z), with z of mean 0 and standard deviation 1, nearly.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ...files import written_whole
from .. import tiny_taesd
from ..short_training import Plan, ShortTraining
from ..widen import widened
from .data import Pictures, load
from .grids import rows
from .moving import Motion, cut, moved, recoloured

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

WIDTH, WIDE = 32, 64
"""Channels that are trained, and TAESD's."""
PLAN = Plan(steps=2000, rate=2e-3, warm_up=50, average=0.995, save_every=120.0)
REFINING = Plan(steps=3000, rate=1e-3, warm_up=50, average=0.995, save_every=120.0)
"""Of the decoder alone."""
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


class _Shown:
    """Batches of moved pictures.

    Args:
        pictures: of which they are drawn.
    """

    def __init__(self, pictures: Pictures) -> None:
        self._pixels = torch.from_numpy(pictures.pixels)
        self._mirrored = torch.tensor([picture.mirrored for picture in pictures.about])

    def drawn(self, random: torch.Generator) -> Tensor:
        """Images (12, 3, 64, 64) in [-1, 1], cut from larger ones."""
        chosen = torch.randint(0, len(self._pixels), (_BATCH,), generator=random)
        images = cut(moved(self._pixels[chosen], self._mirrored[chosen], _MOTION, random), _CUT, random)
        images = recoloured(images, _RECOLOURED, random)
        return images.contiguous(memory_format=torch.channels_last) * 2.0 - 1.0


def train(pictures: Pictures, work: Path, plan: Plan = PLAN) -> AutoencoderTiny:
    """The autoencoder, trained on the pictures; continues where its state was saved.

    Args:
        work: folder of the state, autoencoder_training.safetensors.
    """
    module, shown = autoencoder(WIDTH).to(memory_format=torch.channels_last), _Shown(pictures)  # type: ignore[call-overload]

    def loss(random: torch.Generator) -> Tensor:
        images = shown.drawn(random)
        z = module.encoder(images)
        spread, centre = torch.std_mean(z, dim=(0, 2, 3))
        moments = (centre.square() + (spread - 1.0).square()).mean()
        return sharpness_loss(module.decoder(_noisy(z, random)), images) + _MOMENTS * moments

    training = ShortTraining(module, plan, work / "autoencoder_training.safetensors", "1", "autoencoder")
    training.run(loss)
    return training.averaged()  # type: ignore[return-value]


def refine(pictures: Pictures, work: Path, plan: Plan = REFINING) -> AutoencoderTiny:
    """The trained autoencoder with a decoder that was trained on; the encoder and so all latents stay.

    Args:
        work: folder of autoencoder.safetensors and of the state, decoder_training.safetensors.
    """
    module, shown = read(work).to(memory_format=torch.channels_last), _Shown(pictures)  # type: ignore[call-overload]

    def loss(random: torch.Generator) -> Tensor:
        images = shown.drawn(random)
        with torch.no_grad():
            z = module.encoder(images)
        return sharpness_loss(module.decoder(_noisy(z, random)), images)

    training = ShortTraining(module.decoder, plan, work / "decoder_training.safetensors", encoder_hash(work), "decoder")
    training.run(loss)
    training.averaged()
    return module


def _noisy(z: Tensor, random: torch.Generator) -> Tensor:
    return z + _NOISE * torch.randn(z.shape, generator=random)


def learn(work: Path) -> None:
    """Trains the autoencoder, or goes on, and writes autoencoder.safetensors; a trained one is refined."""
    pictures = load(work).chosen(lambda picture: not picture.held_out)
    write(refine(pictures, work) if path(work).is_file() else train(pictures, work), work)


def write(module: AutoencoderTiny, work: Path) -> None:
    """Writes autoencoder.safetensors, float32."""
    with written_whole(path(work)) as temporary:
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, str(temporary))


def path(work: Path) -> Path:
    """Of the trained weights."""
    return work / "autoencoder.safetensors"


def read(work: Path) -> AutoencoderTiny:
    """The trained autoencoder."""
    module = autoencoder(WIDTH)
    module.load_state_dict(load_file(str(path(work))))
    return module


def encoder_hash(work: Path) -> str:
    """Tells latents of one encoder from those of another, whatever its decoder."""
    sha = hashlib.sha256()
    for key, value in sorted(read(work).encoder.state_dict().items()):
        sha.update(key.encode() + value.numpy().tobytes())
    return sha.hexdigest()[:16]


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
