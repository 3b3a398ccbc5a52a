"""A model made ready for gradients: the port's Backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...training.conditioning import beside_image
from ...training.insertion import Insertion
from ...training.memory import release
from . import sdxl
from .model import Model, run_unet
from .text import TextEncoder
from .text_training import HeadlessText
from .unet_layout import PREFIX
from .weights import Weights


class HeadlessBackbone:
    """The port's Backbone (`training.port`) around a twin of the UNet with the model's patches merged in.

    Inputs are cast to `dtype`, in which the network computes; adapters in float32 beside half-precision weights cast
    for themselves.
    """

    def __init__(self, model: Model, clip: TextEncoder | None = None) -> None:
        facts = model.facts
        self._base = model.base
        self.module: nn.Module = model.base.weights.trainable(model.patches)
        self.family, self.prediction, self.schedule = facts.family, facts.prediction, facts.schedule
        self.device, self.dtype = model.base.device, model.base.dtype
        self.base_name, self.base_path = model.base.name, model.base.path
        self.text = None if clip is None else HeadlessText(clip)

    @property
    def base_hash(self) -> str:
        """SHA-256 of the checkpoint file, computed when first asked for."""
        return self._base.hash

    def __call__(self, x_diff: Tensor, tau: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        moved = {name: value.to(self.device) for name, value in conditioning.items()}
        x = beside_image(x_diff.to(self.device), moved.pop("image", None))
        return run_unet(self.module, self.dtype, x, tau.to(self.device), moved)

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
    def holding(self, insertion: Insertion) -> Iterator[None]:
        """Nobody but the training handles these networks."""
        try:
            yield
        finally:
            insertion.remove()

    def ready(self) -> None:
        """They always are."""

    def free_memory(self) -> None:
        release(self.device)

    @contextmanager
    def sampled(self) -> Iterator[Model]:
        """A model whose network is the one in training."""
        was_training = self.module.training
        self.module.eval()
        try:
            yield Model(replace(self._base, weights=Weights(self.module), dtype=self.dtype))
        finally:
            self.module.train(was_training)

    def checkpoint_names(self) -> Mapping[str, str]:
        layout = self._base.layout
        return {layout.to_diffusers(name): PREFIX + name for name in layout.parameters}


@contextmanager
def training(model: Model, clip: TextEncoder | None = None) -> Iterator[HeadlessBackbone]:
    """Gradients on, for networks that are twins of the model's and clip's: these cannot be changed by training."""
    with torch.inference_mode(False), torch.enable_grad():
        yield HeadlessBackbone(model, clip)
