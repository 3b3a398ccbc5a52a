"""The MODEL socket: a diffusers UNet, how it is sampled, and the patches on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ...alignment import NoiseSchedule
from ...files import sha256_of
from ...samplers.parameterization import FlowParameterization
from ..port import ModelFacts
from .unet_layout import UnetLayout
from .weights import Patch, Weights

LATENT_SCALE = 0.18215
"""SD1's and SD2's factor between the autoencoder's latents and the network's."""


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded UNet, shared by all clones of its MODEL."""

    weights: Weights
    layout: UnetLayout
    prediction: str
    schedule: NoiseSchedule
    path: Path
    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return next(self.weights.module.parameters()).dtype

    @property
    def hash(self) -> str:
        """SHA-256 of the checkpoint file; computed once for each version of the file."""
        return _hash_of(self.path, self.path.stat().st_mtime_ns, self.path.stat().st_size)

    @cached_property
    def layer_names(self) -> Mapping[str, str]:
        """Every name that LoRA files use for a layer -> its module's name."""
        modules = {name for name, module in self.weights.module.named_modules() if hasattr(module, "weight")}
        names = {}
        for ldm, module in self._ldm_names(modules).items():
            names |= dict.fromkeys((f"lora_unet_{ldm.replace('.', '_')}", f"diffusion_model.{ldm}"), module)
        for module in modules:
            flat = module.replace(".", "_")
            processor = module.replace(".to_", ".processor.to_").removesuffix(".0" if ".to_out" in module else "")
            spellings = (
                f"lora_unet_{flat}",
                f"lycoris_{flat}",
                module,
                f"unet.{module}",
                processor,
                f"unet.{processor}",
            )
            names |= dict.fromkeys(spellings, module)
        return names

    def _ldm_names(self, modules: set[str]) -> dict[str, str]:
        known = {key.rpartition(".")[0] for key in self.layout.parameters}
        named = {ldm: self.layout.to_diffusers(ldm) for ldm in known}
        return {ldm: module for ldm, module in named.items() if module in modules}


@dataclass(frozen=True, eq=False)
class Model:
    """A UNet with patches, sampled as a stock model or, where `flow` is set, as a flow."""

    base: Base
    patches: tuple[Patch, ...] = ()
    loras: tuple[Mapping[str, str], ...] = ()
    flow: FlowParameterization | None = None

    def with_patches(self, patches: tuple[Patch, ...], metadata: Mapping[str, str] | None = None) -> Model:
        """A clone with more patches, and the metadata of the LoRA they came from."""
        added = () if metadata is None else (dict(metadata),)
        return replace(self, patches=self.patches + patches, loras=self.loras + added)

    def as_flow(self, flow: FlowParameterization) -> Model:
        """A clone that is sampled in sigma_flow."""
        return replace(self, flow=flow)

    @property
    def facts(self) -> ModelFacts:
        """What the model is, as it is sampled now."""
        alignment = self.flow.alignment if self.flow else None
        return ModelFacts(
            family=self.base.layout.family,
            prediction=alignment.prediction if alignment else self.base.prediction,
            schedule=alignment.schedule if alignment else self.base.schedule,
            in_channels=self.base.layout.config["in_channels"],
            flow=self.flow,
            loras=self.loras,
        )


def run_unet(module: nn.Module, dtype: torch.dtype, x_diff: Tensor, tau: Tensor, context: Tensor) -> Tensor:
    """The UNet's output (B, C, h, w) in float32.

    Args:
        dtype: of the UNet's weights.
        x_diff: (B, in_channels, h, w).
        tau: (B,), fractional timestep.
        context: (B, tokens, width).
    """
    return module(x_diff.to(dtype), tau, encoder_hidden_states=context.to(dtype), return_dict=False)[0].float()


@lru_cache(maxsize=16)
def _hash_of(path: Path, modified: int, size: int) -> str:
    return sha256_of(path)
