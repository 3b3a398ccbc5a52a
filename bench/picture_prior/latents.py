"""The pictures as latents: each as it is and moved a little in several ways, encoded once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...files import written_whole
from . import autoencoder
from .data import Pictures
from .moving import Motion, moved

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

log = logging.getLogger(__name__)
MOTION = Motion(turn=12.0, smallest=0.8, largest=1.0, shift=0.05)
_BATCH = 32


@dataclass(frozen=True)
class Latents:
    """Latents of pictures.

    Args:
        z: (variants, N, 4, 16, 16) float16; variant 0 is the picture itself.
        mean, std: of the encoder's outputs on the pictures themselves; x_data = (z - mean)/std.
    """

    z: Tensor
    mean: float
    std: float

    def x_data(self, variant: Tensor, place: Tensor) -> Tensor:
        """(B, 4, 16, 16) of variants (B,) and places (B,)."""
        return (self.z[variant, place].float() - self.mean) / self.std


def encode(pictures: Pictures, work: Path, variants: int) -> Latents:
    """The latents of so many variants: those that are missing are made; more that are there are used too.

    Args:
        pictures: those that are learned from.
        work: folder of the autoencoder; each variant is a file there, latents_0.safetensors and so on.
        variants: at least one.
    """
    for variant in range(variants):
        if _read(pictures, work, variant) is None:
            _write(pictures, work, variant)
    found: list[Tensor] = []
    while (z := _read(pictures, work, len(found))) is not None:
        found.append(z)
    std, mean = torch.std_mean(found[0].float())
    return Latents(torch.stack(found), float(mean), float(std))


def _path(work: Path, variant: int) -> Path:
    return work / f"latents_{variant}.safetensors"


def _key(pictures: Pictures, work: Path) -> str:
    return f"{autoencoder.encoder_hash(work)} {MOTION} {len(pictures.about)}"


def _read(pictures: Pictures, work: Path, variant: int) -> Tensor | None:
    """A variant's latents, if they were made of these pictures with this autoencoder."""
    from safetensors import safe_open

    if not _path(work, variant).is_file():
        return None
    with safe_open(str(_path(work, variant)), framework="pt") as file:
        return file.get_tensor("z") if (file.metadata() or {}).get("key") == _key(pictures, work) else None


def _write(pictures: Pictures, work: Path, variant: int) -> None:
    from safetensors.torch import save_file

    module = autoencoder.read(work).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z = _encoded(module, pictures, variant, torch.Generator().manual_seed(variant))
    with written_whole(_path(work, variant)) as temporary:
        save_file({"z": z}, str(temporary), metadata={"key": _key(pictures, work)})


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
