"""ComfyUI's UNet and text encoders made ready for gradients, and put back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ...files import sha256_of
from ...training.conditioning import beside_image
from ...training.memory import give_back
from . import loading, models, sampling
from .text_training import ComfyText

_PREFIX = "model.diffusion_model."


class ComfyBackbone:
    """The port's Backbone (`training.port`) around a loaded ModelPatcher."""

    def __init__(self, patcher: Any, text: ComfyText | None = None) -> None:
        facts = models.facts(patcher)
        self._patcher, self._base = patcher, patcher.model
        self.module: nn.Module = patcher.model.diffusion_model
        self.family, self.prediction, self.schedule = facts.family, facts.prediction, facts.schedule
        self.device = patcher.load_device
        self.dtype = self._base.manual_cast_dtype or self._base.get_dtype()
        self.base_name = patcher.attachments.get(loading.BASE, "")
        path = folder_paths.get_full_path("checkpoints", self.base_name) if self.base_name else None
        self.base_path = Path(path) if path else None
        self.base_hash = _file_hash(path, Path(path).stat().st_mtime_ns) if path else ""
        self.text = text

    def __call__(self, x_diff: Tensor, tau: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: value.to(self.device, self.dtype) for name, value in conditioning.items()}
        x = beside_image(x_diff.to(self.dtype), inputs.pop("image", None))
        return self.module(x, tau.float(), transformer_options={}, **inputs)

    def conditioning(self, context: Tensor, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
        if self._base.adm_channels == 0:
            return {"context": context}
        if pooled is None:
            raise ValueError("SDXL needs the pooled text embedding; encode the captions with SDXL's own CLIP")
        items = zip(pooled.split(1), sizes.tolist(), strict=True)
        return {"context": context, "y": torch.cat([self._vector(each, size) for each, size in items])}

    def _vector(self, pooled: Tensor, size: list[int]) -> Tensor:
        """SDXL's vector (1, 2816) of one item."""
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        return self._base.encode_adm(pooled_output=pooled, **dict(zip(names, size, strict=True)))

    def scale_latent(self, latent: Tensor) -> Tensor:
        return self._base.process_latent_in(latent)

    def unscale_latent(self, x_data: Tensor) -> Tensor:
        return self._base.process_latent_out(x_data)

    def layer_names(self) -> Mapping[str, str]:
        own = {name: name for name, module in self.module.named_modules() if hasattr(module, "weight")}
        if self.family == "SDXL":
            return own
        to_own = comfy.utils.unet_to_diffusers(self._base.model_config.unet_config)
        diffusers = {
            v.removesuffix(".weight"): k.removesuffix(".weight") for k, v in to_own.items() if k.endswith(".weight")
        }
        return {name: diffusers[name] for name in own if name in diffusers}

    @contextmanager
    def sampled(self) -> Iterator[Any]:
        """The patcher itself: its network is the one in training. Sampling and decoding may move it away and back."""
        was_training = self.module.training
        self.module.eval()
        try:
            with sampling.silent():
                yield self._patcher
        finally:
            self.module.train(was_training)
            patchers = [self._patcher] if self.text is None else [self._patcher, self.text.patcher]
            comfy.model_management.load_models_gpu(patchers, force_full_load=True)

    def checkpoint_names(self) -> Mapping[str, str]:
        """The checkpoint's names are the module's own."""
        return {name: _PREFIX + name for name, _ in self.module.named_parameters(remove_duplicate=False)}


@contextmanager
def training(model: Any, clip: Any = None) -> Iterator[ComfyBackbone]:
    """Loads model and clip whole, with normal (not inference) weights, frozen, and gradients on; undone at the end."""
    with torch.inference_mode(False), torch.enable_grad(), _in_training():
        patcher = _plain_clone(model)
        text = None if clip is None else ComfyText(clip, _plain_clone(clip.patcher))
        patchers = [patcher] if text is None else [patcher, text.patcher]
        comfy.model_management.load_models_gpu(patchers, force_full_load=True)
        try:
            with ExitStack() as stack:
                stack.enter_context(_frozen(patcher.model.diffusion_model))
                if text is not None:
                    stack.enter_context(_frozen(text.patcher.model))
                    stack.enter_context(text.differentiable())
                yield ComfyBackbone(patcher, text)
        finally:
            comfy.model_management.soft_empty_cache()
            give_back()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """The network with normal weights that require no gradient; mode and requirements as before at the end."""
    _leave_inference_mode(network)
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    was_training = network.training
    try:
        network.requires_grad_(False)
        yield
    finally:
        network.train(was_training)
        for parameter, before in required:
            parameter.requires_grad_(before)


def _plain_clone(model: Any) -> Any:
    """A clone whose weights stay in memory, where the version streams them (dynamic VRAM)."""
    streamed = getattr(model, "is_dynamic", lambda: False)()
    if streamed and "disable_dynamic" in inspect.signature(model.clone).parameters:
        return model.clone(disable_dynamic=True)
    return model.clone()


@contextmanager
def _in_training() -> Iterator[None]:
    """Sets ComfyUI's `in_training` where it exists: it turns off fused kernels that have no backward."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


def _leave_inference_mode(network: nn.Module) -> None:
    """Replaces weights that were loaded under inference mode by equal ones that autograd accepts, one at a time."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()


@lru_cache(maxsize=16)
def _file_hash(path: str, modified: int) -> str:
    return sha256_of(Path(path))
