"""The pictures as latents: each as it is and moved a little in several ways, encoded once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...files import sha256_of, written_whole
from . import autoencoder
from .data import Pictures
from .moving import Motion, moved

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

log = logging.getLogger(__name__)
VARIANTS = 4
MOTION = Motion(turn=12.0, smallest=0.8, largest=1.0, shift=0.05)
_BATCH = 32


@dataclass(frozen=True)
class Latents:
    """Latents of pictures.

    Args:
        z: (variants, N, 4, 16, 16) float16; variant 0 is the picture itself.
        mean, std: of the encoder's outputs over them all; x_data = (z - mean)/std.
    """

    z: Tensor
    mean: float
    std: float

    def x_data(self, variant: Tensor, place: Tensor) -> Tensor:
        """(B, 4, 16, 16) of variants (B,) and places (B,)."""
        return (self.z[variant, place].float() - self.mean) / self.std


def cached(pictures: Pictures, work: Path, variants: int = VARIANTS) -> Latents:
    """The pictures' latents, from latents.safetensors if they were made with this autoencoder."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path, key = work / "latents.safetensors", f"{sha256_of(autoencoder.path(work))} {variants} {MOTION} {len(pictures.about)}"
    if path.is_file():
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return _latents(file.get_tensor("z"))
    module, random = autoencoder.read(work), torch.Generator().manual_seed(0)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z = torch.stack([_encoded(module, pictures, variant, random) for variant in range(variants)])
    with written_whole(path) as temporary:
        save_file({"z": z}, str(temporary), metadata={"key": key})
    return _latents(z)


def _latents(z: Tensor) -> Latents:
    std, mean = torch.std_mean(z.float())
    return Latents(z, float(mean), float(std))


@torch.no_grad()
def _encoded(module: AutoencoderTiny, pictures: Pictures, variant: int, random: torch.Generator) -> Tensor:
    log.info("encoding variant %d of the pictures", variant)
    parts = []
    for start in range(0, len(pictures.about), _BATCH):
        pixels = torch.from_numpy(pictures.pixels[start : start + _BATCH])
        if variant:
            mirrored = torch.tensor([picture.mirrored for picture in pictures.about[start : start + _BATCH]])
            images = moved(pixels, mirrored, MOTION, random)
        else:
            images = pixels.movedim(-1, 1).float() / 255.0
        images = images.contiguous(memory_format=torch.channels_last)
        parts.append(module.encoder(images * 2.0 - 1.0).contiguous().half())
    return torch.cat(parts)
