"""A UNet of seeded random weights behind the headless host, for what costs are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import written_whole
from ..hosts import use
from ..hosts.headless.host import HeadlessHost
from . import ldm_layout
from .tiny_unet import random_unet, unet_config

_TOKENS = 77


class RandomNetwork:
    """A checkpoint of random weights, loaded headless; the host is in use from then on.

    Args:
        folder: of the checkpoint.
        width: channels of its first level.
        full: SD1.5's own size, four levels of two blocks.
        device: that it is on.

    Attributes:
        model: MODEL.
        network: its UNet.
        device, dtype: of the network.
        parameters: how many it has.
    """

    def __init__(self, folder: Path, width: int, full: bool, device: str) -> None:
        config = unet_config(4, 2, width=width) if full else unet_config(1, 1, width=width)
        path = folder / "models" / "checkpoints" / f"random_{width}_{config['layers_per_block']}.safetensors"
        if not path.is_file():
            _write(path, config)
        host = HeadlessHost(folder / "models", folder / "input", folder / "output", device)
        use(host)
        self.model, _, _ = host.load_checkpoint(path.name)
        self.network: nn.Module = self.model.base.weights.module
        self.device, self.dtype = host.device, self.model.base.dtype
        self.parameters = sum(weight.numel() for weight in self.network.parameters())
        self._features = config["cross_attention_dim"]

    def texts(self, count: int) -> list[Tensor]:
        """Embeddings (1, 77, D) of texts that nobody has written."""
        random = torch.Generator().manual_seed(0)
        return [torch.randn(1, _TOKENS, self._features, generator=random) for _ in range(count)]


def call_unet(network: nn.Module, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
    """The bare call of the headless host's UNet.

    Args:
        x: (B, 4, H, W).
        tau: (B,).
        context: (B, 77, D).
    """
    return network(x, tau, encoder_hidden_states=context, return_dict=False)[0]


def _write(path: Path, config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    unet = ldm_layout.unet_to_ldm(random_unet(config, 0).state_dict(), config["layers_per_block"])
    with written_whole(path) as temporary:
        save_file(ldm_layout.checkpoint({key: value.half() for key, value in unet.items()}, {}, {}), str(temporary))
