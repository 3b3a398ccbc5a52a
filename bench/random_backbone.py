"""A UNet of random weights behind the port's Backbone, without a checkpoint: made on its device within seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import NoiseSchedule
from ..hosts.headless.model import LATENT_SCALES, run_unet
from ..training.conditioning import beside_image
from ..training.insertion import Insertion
from ..training.memory import release
from .ldm_layout import UNET_PREFIX

TOKENS, POOLED = 77, 1280
"""Of a text embedding, and the width of SDXL's pooled one."""
_FAMILIES = {768: "SD1", 1024: "SD2", 2048: "SDXL"}


class RandomBackbone:
    """The port's Backbone around diffusers' UNet with its library's initialisation.

    Args:
        config: arguments of diffusers' UNet2DConditionModel; the width of its text tells the family.
        device: that it is on.
        dtype: of its weights.
        seed: of its weights.
    """

    text = None
    prediction, base_name, base_hash = "eps", "random", ""

    def __init__(self, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        from diffusers import UNet2DConditionModel

        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            module = UNet2DConditionModel(**config)
        # Module by module: diffusers' own `to` warns of half precision.
        self.module: nn.Module = nn.Module.to(module, dtype).requires_grad_(False).eval()
        self.device, self.dtype = device, dtype
        self.context_width = int(config["cross_attention_dim"])
        self.family = _FAMILIES[self.context_width]
        self.schedule = NoiseSchedule.scaled_linear()
        self.base_path: Path | None = None

    def __call__(self, x_diff: Tensor, tau: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        moved = {name: value.to(self.device) for name, value in conditioning.items()}
        x = beside_image(x_diff.to(self.device), moved.pop("image", None))
        return run_unet(self.module, self.dtype, x, tau.to(self.device), moved)

    def conditioning(self, context: Tensor, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
        return {"context": context} if pooled is None else {"context": context, "pooled": pooled, "sizes": sizes}

    def scale_latent(self, latent: Tensor) -> Tensor:
        return latent * LATENT_SCALES[self.family]

    def unscale_latent(self, x_data: Tensor) -> Tensor:
        return x_data / LATENT_SCALES[self.family]

    def layer_names(self) -> Mapping[str, str]:
        """diffusers' names, of every layer."""
        return {path: path for path, module in self.module.named_modules() if hasattr(module, "weight")}

    @contextmanager
    def holding(self, insertion: Insertion) -> Iterator[None]:
        """Nobody but the training handles this network."""
        try:
            yield
        finally:
            insertion.remove()

    def ready(self) -> None:
        """It always is."""

    def free_memory(self) -> None:
        release(self.device)

    @contextmanager
    def sampled(self) -> Iterator[RandomBackbone]:
        yield self

    def checkpoint_names(self) -> Mapping[str, str]:
        return {path: UNET_PREFIX + path for path, _ in self.module.named_parameters()}

    def save(self, path: Path) -> None:
        """Writes its weights as a checkpoint, from which preset full can make a new one."""
        from safetensors.torch import save_file

        weights = {path: value.detach().contiguous() for path, value in self.module.named_parameters()}
        save_file({UNET_PREFIX + name: value for name, value in weights.items()}, str(path))
        self.base_path = path

    def texts(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """Embeddings of texts that nobody has written, on the CPU: context (B, 77, width), SDXL's pooled (B, 1280)."""
        random = torch.Generator().manual_seed(seed)
        context = torch.randn(count, TOKENS, self.context_width, generator=random)
        return context, torch.randn(count, POOLED, generator=random) if self.family == "SDXL" else None


def square_sizes(count: int, side: int) -> Tensor:
    """(B, 6), the sizes of uncropped square images, pixels."""
    return torch.tensor([[side, side, 0, 0, side, side]]).expand(count, -1)
