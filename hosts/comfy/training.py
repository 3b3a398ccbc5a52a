"""ComfyUI's UNet and text encoders made ready for gradients, and put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.utils
import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import PatcherInjection
from torch import Tensor, nn

from ...files import sha256_of
from ...training.conditioning import beside_image
from ...training.insertion import Insertion
from ...training.memory import give_back
from ..port import HostError
from . import models, recognition, sampling
from .text_training import ComfyText

_PREFIX = "model.diffusion_model."
Attention = tuple[Callable[..., Tensor], Callable[..., Tensor]]

_EVERYTHING = 1e20
"""Bytes: ComfyUI unloads what else is on the device, as for its own training."""


class ComfyBackbone:
    """The port's Backbone (`training.port`) around a loaded ModelPatcher.

    Args:
        patcher: of the network; training's own clone.
        text: its text encoders, where they are trained.
        own_attention: what samples are drawn with; the present choice where not given.
    """

    def __init__(self, patcher: Any, text: ComfyText | None = None, own_attention: Attention | None = None) -> None:
        facts = models.facts(patcher)
        self._patcher, self._base = patcher, patcher.model
        self._residents = [Resident(each) for each in (patcher, text and text.patcher) if each is not None]
        self.module: nn.Module = patcher.model.diffusion_model
        self.family, self.prediction, self.schedule = facts.family, facts.prediction, facts.schedule
        self.device = patcher.load_device
        self.dtype = self._native = self._base.manual_cast_dtype or self._base.get_dtype()
        self.base_path = path = recognition.checkpoint_of(patcher)
        known = path is not None and not recognition.is_merged(patcher)
        self.base_name = recognition.checkpoint_name(path) if path and known else ""
        self.text = text
        self._own_attention = own_attention or _chosen_attention()

    @property
    def base_hash(self) -> str:
        """SHA-256 of the file that has the name; "" where there is none."""
        path = self.base_path if self.base_name else None
        return _file_hash(path, path.stat().st_mtime_ns) if path else ""

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
    def holding(self, insertion: Insertion) -> Iterator[None]:
        """ComfyUI's own injections: it takes them out before it touches a weight, and puts them back when it is done."""
        resident = next(each for each in self._residents if each.owns(insertion.network))
        with resident.holding(insertion):
            yield

    def ready(self) -> None:
        if not all(resident.is_ready for resident in self._residents):
            self._load()

    def _load(self) -> None:
        load([resident.patcher for resident in self._residents])

    def end(self) -> None:
        """Training gives the patchers back to ComfyUI."""
        for resident in self._residents:
            resident.end()

    def free_memory(self) -> None:
        give_back()
        comfy.model_management.soft_empty_cache()

    @contextmanager
    def sampled(self) -> Iterator[Any]:
        """A clone of the patcher, with the network in training. Sampling and decoding may move that away and back."""
        was_training = self.module.training
        self.module.eval()
        self._note_sampling(True)
        try:
            with sampling.silent(), _attention_by(*self._own_attention):
                yield self._clone_for_sampling()
        finally:
            self._note_sampling(False)
            self.module.train(was_training)
            self._load()

    def _note_sampling(self, is_sampled: bool) -> None:
        for resident in self._residents:
            resident.is_sampled = is_sampled

    def _clone_for_sampling(self) -> Any:
        clone = self._patcher.clone()
        if self.dtype != self._native:
            clone.add_object_patch("manual_cast_dtype", self.dtype)  # what ComfyUI casts a network's inputs to
        return clone

    def checkpoint_names(self) -> Mapping[str, str]:
        """The checkpoint's names are the module's own."""
        return {name: _PREFIX + name for name, _ in self.module.named_parameters(remove_duplicate=False)}


class Resident:
    """A ModelPatcher whose network training has taken over, and what training has put into that.

    ComfyUI notes in each patcher whether injections are in place, though clones share one network: a clone that is gone
    would leave them there for good. Here every clone answers for the network itself.

    ComfyUI also keeps a part of the layers away from a device that is nearly full, and merges LoRAs into those whenever
    they are called. Where a network is trained it is there whole or not at all (`is_whole`).

    Args:
        patcher: the clone that training made for itself.
    """

    def __init__(self, patcher: Any) -> None:
        self.patcher, self.is_sampled, self._ended = patcher, False, False
        self._insertions: list[_Held] = []
        self._own = own = type(patcher)

        def load_whole(this: Any, *args: Any, full_load: bool = False, **kwargs: Any) -> Any:
            return own.load(this, *args, full_load=full_load or self.is_whole, **kwargs)

        def unload_some(this: Any, *args: Any, **kwargs: Any) -> Any:
            return 0 if self.is_whole else own.partially_unload(this, *args, **kwargs)

        answers = {
            "is_injected": property(lambda _: any(each.inserted for each in self._insertions), lambda *_: None),
            "load": load_whole,
            "partially_unload": unload_some,
        }
        patcher.__class__ = type(own.__name__, (own,), answers)

    @property
    def is_whole(self) -> bool:
        """Whether the network must be loaded whole: in training, and for samples where what is trained stands in place
        of its weights or reads them."""
        in_training = not (self.is_sampled or self._ended)
        return in_training or any(each.needs_whole for each in self._insertions)

    def end(self) -> None:
        """The patcher is an ordinary one again, and so are its clones; nothing here keeps its network in memory."""
        self._ended = True
        self.patcher.__class__ = self._own
        self.patcher = None

    def owns(self, network: nn.Module) -> bool:
        """Whether a network is in this patcher's model."""
        return any(module is network for module in self.patcher.model.modules())

    @property
    def is_ready(self) -> bool:
        """Whether all weights are on the device, as autograd accepts them, and all insertions in them."""
        model = self.patcher.model
        loaded = model.model_loaded_weight_memory > 0 and not model.model_lowvram
        moved = any(parameter.is_inference() for parameter in model.parameters())
        return loaded and not moved and all(each.inserted for each in self._insertions)

    @contextmanager
    def holding(self, insertion: Insertion) -> Iterator[None]:
        """The insertion belongs to the patcher and to clones of it that are made meanwhile, and to nobody afterwards."""
        key = f"diff2flow.{id(insertion)}"
        held = _Held(insertion)
        self._insertions.append(held)
        self.patcher.set_injections(key, [PatcherInjection(inject=held.put_in, eject=held.take_out)])
        try:
            yield
        finally:
            held.end()
            self.patcher.remove_injections(key)
            self._insertions.remove(held)


class _Held:
    """An insertion that can be put in place only while training holds it: clones may outlive the training."""

    def __init__(self, insertion: Insertion) -> None:
        self._insertion, self._ended = insertion, False
        self.needs_whole = insertion.needs_whole

    @property
    def inserted(self) -> bool:
        return self._insertion.inserted

    def put_in(self, patcher: Any) -> None:
        """ComfyUI's injection."""
        if not self._ended:
            self._insertion.insert()

    def take_out(self, patcher: Any) -> None:
        """ComfyUI's ejection."""
        self._insertion.remove()

    def end(self) -> None:
        self._ended = True
        self._insertion.remove()


def load(patchers: list[Any]) -> None:
    """Loads models whole, with normal weights; all other models leave the device, however many fit beside them.

    Under inference mode, as ComfyUI loads for every node: weights of models that were made so and are moved without it
    are broken for good.
    """
    with torch.inference_mode():
        comfy.model_management.load_models_gpu(patchers, memory_required=_EVERYTHING, force_full_load=True)
    for patcher in patchers:
        _leave_inference_mode(patcher.model)


@contextmanager
def training(model: Any, clip: Any = None) -> Iterator[ComfyBackbone]:
    """Loads model and clip whole, with normal (not inference) weights, frozen, and gradients on; undone at the end.

    Raises:
        HostError: the network takes more than what training gives it, or cannot be loaded for it.
    """
    _require_known_inputs(model)
    with torch.inference_mode(False), torch.enable_grad(), _in_training():
        patcher = _plain_clone(model, "model")
        text = None if clip is None else ComfyText(clip, _plain_clone(clip.patcher, "clip"))
        load([patcher] if text is None else [patcher, text.patcher])
        try:
            with ExitStack() as stack:
                stack.enter_context(_frozen(patcher.model.diffusion_model))
                if text is not None:
                    stack.enter_context(_frozen(text.patcher.model))
                    stack.enter_context(text.differentiable())
                own_attention = _chosen_attention()
                stack.enter_context(_attention_by(attention.attention_pytorch, attention.attention_pytorch))
                backbone = ComfyBackbone(patcher, text, own_attention)
                stack.callback(backbone.end)
                yield backbone
        finally:
            comfy.model_management.soft_empty_cache()
            give_back()


def _require_known_inputs(model: Any) -> None:
    """HostError where a network takes something beside x, time and text that is not SDXL's vector."""
    base = model.model
    if base.diffusion_model.num_classes is not None and not isinstance(base, comfy.model_base.SDXL):
        raise HostError(
            f"model: the network of a {type(base).__name__} ({type(base.model_config).__name__}) takes the embedding of"
            " an image or a level of noise beside the text, as those of unCLIP and of upscalers do; it cannot be trained"
            " and no pairs can be made with it: choose a plain checkpoint"
        )


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """The network without weights that require a gradient; mode and requirements as before at the end."""
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    was_training = network.training
    try:
        network.requires_grad_(False)
        yield
    finally:
        network.train(was_training)
        for parameter, before in required:
            parameter.requires_grad_(before)


def _plain_clone(model: Any, socket: str) -> Any:
    """A clone whose weights stay in memory, where the version streams them (dynamic VRAM).

    Raises:
        HostError: it cannot be had, as whoever loaded the model did not say from which file.
    """
    streamed = getattr(model, "is_dynamic", lambda: False)()
    if not streamed or "disable_dynamic" not in inspect.signature(model.clone).parameters:
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise HostError(
            f"{socket}: its weights are streamed (dynamic VRAM), and the node that loaded it does not tell from which"
            " file, so that it cannot be loaded for training; load it by Load Checkpoint or Diff2Flow Checkpoint Loader,"
            " or start ComfyUI with --disable-dynamic-vram"
        ) from error


def _chosen_attention() -> Attention:
    """The functions that ComfyUI's UNets compute attention with, without a mask and with one."""
    return attention.optimized_attention, attention.optimized_attention_masked


@contextmanager
def _attention_by(plain: Callable[..., Tensor], masked: Callable[..., Tensor]) -> Iterator[None]:
    """Other functions for that while the context lasts. In training PyTorch's: it has a backward pass and can be traced,
    unlike SageAttention, which a start option or a node of another pack may have chosen."""
    before = _chosen_attention()
    attention.optimized_attention, attention.optimized_attention_masked = plain, masked
    try:
        yield
    finally:
        attention.optimized_attention, attention.optimized_attention_masked = before


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
def _file_hash(path: Path, modified: int) -> str:
    return sha256_of(path)
