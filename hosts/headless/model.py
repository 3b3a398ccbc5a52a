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
from ..choice import FlowChoice, as_trained
from ..port import ModelFacts
from .unet_layout import UnetLayout
from .weights import Patch, Weights

_FIRST = "conv_in"
LATENT_SCALES = {"SD1": 0.18215, "SD2": 0.18215, "SDXL": 0.13025}
"""A family's factor between the autoencoder's latents and the network's."""

_ALIASES = {"add_embedding": "class_embedding"}
"""Modules of diffusers' UNet, and what some LoRA files call them."""


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded UNet, shared by all clones of its MODEL.

    Args:
        dtype: that the UNet computes in; no parameter is asked for it: the first may be a trained one, in float32.
    """

    weights: Weights
    layout: UnetLayout
    prediction: str
    schedule: NoiseSchedule
    path: Path
    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_scale(self) -> float:
        """Factor between the autoencoder's latents and the network's."""
        return LATENT_SCALES[self.layout.family]

    @property
    def hash(self) -> str:
        """SHA-256 of the checkpoint file; computed once for each version of the file."""
        return _hash_of(self.path, self.path.stat().st_mtime_ns, self.path.stat().st_size)

    @cached_property
    def layer_names(self) -> Mapping[str, str]:
        """Every name that `training.lora_keys` gives a layer -> its module's name; ComfyUI's own names of biases, too.

        kohya's names are made of the checkpoint's (LDM's or SGM's) or of diffusers'.
        """
        names, biased = {}, {name for name, _ in self.weights.module.named_parameters() if name.endswith(".bias")}
        for ldm, module in self.ldm_names.items():
            names |= {_kohya(ldm): module, f"diffusion_model.{ldm}": module}
            if f"{module}.bias" in biased:
                names[f"diffusion_model.{ldm}.bias"] = f"{module}.bias"
        for module in self._modules:
            names[_kohya(module)] = module
            names |= {
                _kohya(module.replace(o, a, 1)): module for o, a in _ALIASES.items() if module.startswith(f"{o}.")
            }
        return names

    @cached_property
    def ldm_names(self) -> Mapping[str, str]:
        """The checkpoint's name of a layer (LDM's or SGM's) -> its module's name."""
        known = {key.rpartition(".")[0] for key in self.layout.parameters}
        named = {ldm: self.layout.to_diffusers(ldm) for ldm in known}
        return {ldm: module for ldm, module in named.items() if module in self._modules}

    @cached_property
    def _modules(self) -> set[str]:
        return {name for name, module in self.weights.module.named_modules() if hasattr(module, "weight")}


@dataclass(frozen=True, eq=False)
class Model:
    """A UNet with patches, sampled as a stock model or, where `flow` says so, as a flow.

    Args:
        fixed: the flow, where it is certain.
        choice: what the user chose of it, where the LoRAs decide the rest.
    """

    base: Base
    patches: tuple[Patch, ...] = ()
    loras: tuple[Mapping[str, str], ...] = ()
    fixed: FlowParameterization | None = None
    choice: FlowChoice | None = None

    def with_patches(self, patches: tuple[Patch, ...], metadata: Mapping[str, str] | None = None) -> Model:
        """A clone with more patches, and the metadata of the LoRA they came from."""
        added = () if metadata is None else (dict(metadata),)
        return replace(self, patches=self.patches + patches, loras=self.loras + added)

    def as_flow(self, flow: FlowParameterization) -> Model:
        """A clone that is sampled in sigma_flow."""
        return replace(self, fixed=flow, choice=None)

    def as_chosen_flow(self, choice: FlowChoice) -> Model:
        """A clone that is sampled in sigma_flow; what the choice leaves open follows from the LoRAs on it."""
        clone = replace(self, fixed=None, choice=choice.after(self.choice))
        clone.flow  # noqa: B018  (raises what cannot be)
        return clone

    @cached_property
    def flow(self) -> FlowParameterization | None:
        """The flow that the model is sampled along, None for a stock model."""
        return self.choice.flow(self._stock_facts) if self.choice else self.fixed

    @property
    def facts(self) -> ModelFacts:
        """What the model is, as it is sampled now."""
        if self.flow is None:
            return self._stock_facts
        alignment = self.flow.alignment
        return replace(self._stock_facts, prediction=alignment.prediction, schedule=alignment.schedule, flow=self.flow)

    @property
    def _stock_facts(self) -> ModelFacts:
        """What it is without a flow."""
        facts = ModelFacts(
            family=self.base.layout.family,
            prediction=self.base.prediction,
            schedule=self.base.schedule,
            in_channels=self._in_channels,
            loras=self.loras,
            sees_image=self.sees_image,
            base_name=self.base.name,
        )
        return as_trained(facts)

    @property
    def sees_image(self) -> bool:
        """Whether the first convolution is wider than the checkpoint's."""
        return self._in_channels > self.base.layout.config["in_channels"]

    @property
    def _in_channels(self) -> int:
        """Of the first convolution, with what LoRAs and training have added."""
        own = self.base.weights.module.get_submodule(_FIRST).weight.shape[1]
        shapes = (patch.shape for patch in self.patches if patch.target == f"{_FIRST}.weight" and patch.strength)
        return max([own, *(shape[1] for shape in shapes if shape)])


def run_unet(
    module: nn.Module, dtype: torch.dtype, x_diff: Tensor, tau: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """The UNet's output (B, C, h, w) in float32.

    Args:
        dtype: of the UNet's weights.
        x_diff: (B, in_channels, h, w).
        tau: (B,), fractional timestep.
        conditioning: "context" (B, tokens, width); SDXL also "pooled" (B, width) and "sizes" (B, 6), in pixels:
            original height and width, crop's top and left, target height and width.
    """
    context = conditioning["context"].to(dtype)
    beside = None
    if "pooled" in conditioning:  # each size is embedded by itself, behind the pooled text
        # Float32: they are joined inside the network, which autocast to bf16 refuses for fp16.
        beside = {"text_embeds": conditioning["pooled"].float(), "time_ids": conditioning["sizes"].float()}
    return module(x_diff.to(dtype), tau, encoder_hidden_states=context, added_cond_kwargs=beside, return_dict=False)[
        0
    ].float()


def _kohya(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


@lru_cache(maxsize=16)
def _hash_of(path: Path, modified: int, size: int) -> str:
    return sha256_of(path)
