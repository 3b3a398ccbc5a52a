"""The prior as one file in Stable Diffusion 1.5's layout, which ComfyUI and diffusers load."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...files import written_whole
from .. import ldm_layout, tiny_taesd
from . import autoencoder, network, words
from .stored import Prior

_METADATA = {"modelspec.architecture": "stable-diffusion-v1", "modelspec.title": "Diff2Flow picture prior"}


def state(prior: Prior, width: int = network.WIDE) -> dict[str, Tensor]:
    """All weights under the names of a checkpoint; network and text in float16, the autoencoder in float32.

    The autoencoder's latents in the file are z/scale + shift, so that 0.18215 times them are x_data.

    Args:
        width: of the network, see `network.state_for_clip`.
    """
    unet = {key: value.half() for key, value in network.state_for_clip(prior.network, width).items()}
    scale = torch.tensor(tiny_taesd.LATENT_SCALE * prior.std)
    vae = ldm_layout.taesd_to_comfy(autoencoder.wide_state(prior.autoencoder), scale, -prior.mean / scale)
    return ldm_layout.checkpoint(ldm_layout.unet_to_ldm(unet, 1), vae, words.clip_l(prior.network.words))


def write(prior: Prior, path: Path, width: int = network.WIDE) -> None:
    """Writes the checkpoint, whole or not at all."""
    from safetensors.torch import save_file

    about = {f"diff2flow.{key}": str(value) for key, value in prior.provenance.items()}
    with written_whole(path) as temporary:
        save_file(state(prior, width), str(temporary), metadata=_METADATA | about)
