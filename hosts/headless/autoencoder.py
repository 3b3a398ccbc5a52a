"""The VAE socket: Stable Diffusion's autoencoder or the tiny one (TAESD), read from a checkpoint's keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..port import HostError

PREFIX = "first_stage_model."


class Autoencoder:
    """Images to latents and back, an image at a time (a batch needs no more memory than one image).

    Args:
        module: the network.
        encode, decode: images in [-1, 1] (B, 3, H, W) to latents (B, 4, H/8, W/8), and back.
        factor: pixels a latent, 8.
        factors: what `encode` and `decode` do to latents beside the network, by the names of `USUAL`.

    Attributes:
        path: of the checkpoint that it came from.
    """

    USUAL: Mapping[str, float] = {"scale of latents": 1.0, "shift of latents": 0.0}
    """What changes nothing."""

    def __init__(
        self,
        module: nn.Module,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        factor: int,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self.path: Path | None = None
        self.factors = factors or self.USUAL
        self.module, self._encode, self._decode, self.factor = module, encode, decode, factor

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Latents (B, C, h, w) of an IMAGE (B, H, W, 3), cropped at the centre to multiples of the factor.

        Raises:
            HostError: the image is smaller than one latent.
        """
        pixels = self._cropped(image[..., :3]).movedim(-1, 1)
        parts = [self._encode(self._to_device(part) * 2.0 - 1.0).float().cpu() for part in pixels.split(1)]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """IMAGE (B, H, W, 3) in [0, 1] of latents in the autoencoder's own scale."""
        parts = [self._decode(self._to_device(part)).float().cpu() for part in latent.split(1)]
        return (torch.cat(parts) / 2.0 + 0.5).clamp(0.0, 1.0).movedim(1, -1)

    def _cropped(self, image: Tensor) -> Tensor:
        for axis in (1, 2):
            size = image.shape[axis] // self.factor * self.factor
            if not size:
                raise HostError(
                    f"the image is {image.shape[2]}x{image.shape[1]} pixels; the autoencoder needs at least"
                    f" {self.factor}x{self.factor}"
                )
            image = image.narrow(axis, image.shape[axis] % self.factor // 2, size)
        return image

    def _to_device(self, x: Tensor) -> Tensor:
        parameter = next(self.module.parameters())
        return x.to(parameter.device, parameter.dtype)


def read_autoencoder(state: Mapping[str, Tensor], name: str, device: torch.device) -> Autoencoder | None:
    """The checkpoint's autoencoder, float32; None if it has none.

    Raises:
        HostError: an autoencoder of another kind, or incomplete.
    """
    weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if not weights:
        return None
    if "taesd_decoder.1.weight" in weights:
        return _tiny(weights, name, device)
    if "decoder.conv_in.weight" in weights and "encoder.conv_in.weight" in weights:
        return _kl(weights, name, device)
    raise HostError(
        f"'{name}' has an autoencoder that is neither Stable Diffusion's nor TAESD; choose another checkpoint"
    )


def _kl(weights: Mapping[str, Tensor], name: str, device: torch.device) -> Autoencoder:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from .checkpoint import fill

    config = _kl_config(weights)
    with torch.device("meta"):
        module = AutoencoderKL(**config)
    prefixed = {PREFIX + key: value for key, value in weights.items()}
    fill(module, convert_ldm_vae_checkpoint(prefixed, config), name, "autoencoder").to(device)
    return Autoencoder(
        module,
        encode=lambda x: module.encode(x).latent_dist.mode(),
        decode=lambda z: module.decode(z).sample,
        factor=2 ** (len(config["block_out_channels"]) - 1),
    )


def _kl_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = _count(weights, "encoder.down")
    channels = tuple(weights[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels))
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": _count(weights, "encoder.down.0.block"),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }


def _tiny(weights: Mapping[str, Tensor], name: str, device: torch.device) -> Autoencoder:
    from diffusers import AutoencoderTiny

    from .checkpoint import fill

    with torch.device("meta"):
        module = AutoencoderTiny(latent_channels=weights["taesd_decoder.1.weight"].shape[1])
    fill(module, {_tiny_name(key): value for key, value in weights.items()}, name, "tiny autoencoder").to(device)
    module.to(memory_format=torch.channels_last)  # quicker on CPUs, where its convolutions are narrow
    scale = float(weights.get("vae_scale", torch.tensor(1.0)))
    shift = float(weights.get("vae_shift", torch.tensor(0.0)))
    return Autoencoder(
        module,
        encode=lambda x: module.encoder(x) / scale + shift,
        decode=lambda z: module.decoder((z - shift) * scale),
        factor=8,
        factors={"scale of latents": scale, "shift of latents": shift},
    )


def _tiny_name(key: str) -> str:
    """diffusers' name of a TAESD key; ComfyUI counts the decoder's clamp as layer 0, diffusers does not count it."""
    match = re.match(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", key)
    if not match:
        return key
    half, layer, rest = match.groups()
    return f"{half}.layers.{int(layer) - (half == 'decoder')}.{rest}"


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, weights) if m), default=-1)
