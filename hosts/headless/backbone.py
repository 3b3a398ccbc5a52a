"""A model made ready for gradients: the port's Backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import sdxl
from .model import Model, run_unet


class HeadlessBackbone:
    """The port's Backbone (`training.port`) around a twin of the UNet with the model's patches merged in.

    Inputs are cast to the weights' dtype; adapters in float32 beside half-precision weights cast for themselves
    (unmeasured here: there was no GPU).
    """

    def __init__(self, model: Model) -> None:
        facts = model.facts
        self._base = model.base
        self.module: nn.Module = model.base.weights.trainable(model.patches)
        self.family, self.prediction, self.schedule = facts.family, facts.prediction, facts.schedule
        self.device, self.dtype = model.base.device, model.base.dtype
        self.base_name = model.base.name

    @property
    def base_hash(self) -> str:
        """SHA-256 of the checkpoint file, computed when first asked for."""
        return self._base.hash

    def __call__(self, x_diff: Tensor, tau: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        moved = {name: value.to(self.device) for name, value in conditioning.items()}
        return run_unet(self.module, self.dtype, x_diff.to(self.device), tau.to(self.device), moved)

    def conditioning(self, context: Tensor, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
        if self.family != "SDXL":
            return {"context": context}
        return {"context": context, "pooled": sdxl.checked(pooled, self._base.layout.pooled_width), "sizes": sizes}

    def scale_latent(self, latent: Tensor) -> Tensor:
        return latent * self._base.latent_scale

    def unscale_latent(self, x_data: Tensor) -> Tensor:
        return x_data / self._base.latent_scale

    def layer_names(self) -> Mapping[str, str]:
        """SDXL: the checkpoint's (SGM's) names; else diffusers' names, which are the module's own."""
        to_module = self._base.ldm_names
        return {module: ldm if self.family == "SDXL" else module for ldm, module in to_module.items()}


@contextmanager
def training(model: Model) -> Iterator[HeadlessBackbone]:
    """Gradients on, for a network that is a twin of the model's: the model itself cannot be changed by training."""
    with torch.inference_mode(False), torch.enable_grad():
        yield HeadlessBackbone(model)
