"""What is trained, put into the networks and taken out again without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from .full import trained_in_full
from .insertion import Insertion, LayerInsertion, replace_layer
from .layers import LoraSettings, TrainedLayer, choose_layers, choose_text_layers
from .lora_layers import FullChange, file_tensors, inject_lora, trained_tensors
from .port import Backbone

_UNET = "lora_unet"
Hold = Callable[[Insertion], AbstractContextManager[None]]


class Trained(Protocol):
    """What the loop needs of that which is trained: `Adapters`, or `full.FullNetwork`.

    Attributes:
        size: number of trained parameters.
        share: of the parameters of the networks they are in or beside; 1 is all.
        describe: both in words, before the first step.
        trains_text: whether text encoders are trained, so that captions must be encoded in every step.
    """

    size: int
    share: float
    describe: str
    trains_text: bool

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, float32, in a fixed order."""

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The same as "unet" and "text"; either may be empty."""

    def without_gradient(self) -> list[str]:
        """Names of the trained layers (preset full: parameters) of which something has no gradient."""

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Their values by the keys of the file they are saved in, on the CPU."""

    def switched_off(self) -> AbstractContextManager[None]:
        """The network computes what it did before training; ValueError where it cannot."""


class Adapters:
    """The trainable layers inside networks.

    Args:
        parts: network, prefix of its keys in LoRA files ("lora_unet", "lora_te"), and the layers injected.
        base_size: number of parameters that the bare networks have.
    """

    def __init__(self, parts: Sequence[tuple[nn.Module, str, Sequence[TrainedLayer]]], base_size: int) -> None:
        self._layers = [
            (prefix, layer, network.get_submodule(layer.path)) for network, prefix, layers in parts for layer in layers
        ]
        self._base_size = base_size

    @property
    def layers(self) -> list[TrainedLayer]:
        """Which they are."""
        return [layer for _, layer, _ in self._layers]

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(layer.size for layer in self.layers)

    @property
    def share(self) -> float:
        """Trained parameters for each one of the networks."""
        return self.size / max(1, self._base_size)

    @property
    def describe(self) -> str:
        """ "training 6.78 M of 859.52 M parameters (0.79 %)"."""
        return describe(self.size, self._base_size)

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder is among the networks."""
        return any(prefix != _UNET for prefix, _, _ in self._layers)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, float32, in a fixed order."""
        return [parameter for group in self.groups().values() for parameter in group]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters of the network ("unet") and of the text encoders ("text")."""
        groups: dict[str, list[nn.Parameter]] = {"unet": [], "text": []}
        for prefix, layer, module in self._layers:
            groups["unet" if prefix == _UNET else "text"] += trained_tensors(module, layer).values()
        return groups

    def without_gradient(self) -> list[str]:
        """Names in LoRA files of the layers of which a trained parameter has no gradient.

        Text encoders count only where none of their layers has one: those behind the layer that the prompt is read
        from (clip skip, SDXL) never do.
        """
        missing: dict[bool, list[str]] = {True: [], False: []}
        counts = {True: 0, False: 0}
        for prefix, layer, module in self._layers:
            is_text = prefix != _UNET
            counts[is_text] += 1
            if any(parameter.grad is None for parameter in trained_tensors(module, layer).values()):
                missing[is_text].append(f"{prefix}_{layer.file_name}")
        return missing[False] + (missing[True] if len(missing[True]) == counts[True] else [])

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The diffusion network computes what it did before training; no gradient reaches its layers meanwhile."""
        modules = [module for prefix, _, module in self._layers if prefix == _UNET]
        try:
            for module in modules:
                module.enable_adapters(False)
            yield
        finally:
            for module in modules:
                module.enable_adapters(True)

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights as LoRA files hold them (kohya's keys), on the CPU, in `dtype`; alpha, dora_scale in float32.

        weight = base + alpha/rank · lora_up · lora_down, for DoRA that times dora_scale / |base|; in full: weight =
        base + diff, bias = base + diff_b.

        Raises:
            ValueError: a weight that is not finite in `dtype`.
        """
        state = {}
        for prefix, layer, module in self._layers:
            key = f"{prefix}_{layer.file_name.replace('.', '_')}"
            state |= {f"{key}.{ending}": tensor for ending, tensor in file_tensors(module, layer, dtype).items()}
        return state


def describe(trained: int, total: int) -> str:
    """How much of a network is trained, for people."""
    share = 100.0 * trained / max(1, total)
    return f"training {trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters ({share:.2f} %)"


def trainable(
    backbone: Backbone, settings: LoraSettings, seed: int, inputs: int = 0
) -> AbstractContextManager[Trained]:
    """What `settings` train, in the backbone's networks; the networks are what they were when the context ends.

    Args:
        backbone: the bare networks; `text` is set where settings.text_encoder is.
        settings: LoRA layers, or preset full.
        seed: of the run.
        inputs: channels that the network is to take, its first layer widened to them; 0: as many as it does.

    Raises:
        ValueError: nothing to train, a pattern that matches nothing, no text encoder, or for preset full no base
            checkpoint that a new one can be made from.
    """
    return trained_in_full(backbone) if settings.full else _adapted_backbone(backbone, settings, seed, inputs)


@contextmanager
def adapted(network: nn.Module, layers: Sequence[TrainedLayer], seed: int) -> Iterator[Adapters]:
    """The network with trainable layers that change nothing yet; without them again when the context ends.

    The frozen layers stay the same objects with the same parameters, and are called with their bias by the layers
    that wrap them. lora_down is drawn from `seed` layer by layer (He uniform), lora_up and changes in full are 0.

    Args:
        network: the bare network.
        layers: from `choose_layers`.
        seed: of the run.
    """
    base_size = _size(network)
    with _injected(network, layers, seed, "lora", lambda _: nullcontext()):
        yield Adapters([(network, _UNET, layers)], base_size)


@contextmanager
def _adapted_backbone(backbone: Backbone, settings: LoraSettings, seed: int, inputs: int) -> Iterator[Adapters]:
    """LoRA layers in the network and, where the settings say so, in the text encoders."""
    names, network = backbone.layer_names(), backbone.module
    layers = choose_layers(network, names, settings, inputs) if settings.trains_network else []
    parts = [(network, _UNET, layers), *_text_parts(backbone, settings)]
    base_size = sum(_size(part) for part, _, _ in parts)
    with ExitStack() as stack:
        for part, prefix, chosen in parts:
            purpose = "lora" if prefix == _UNET else f"lora/{prefix}"
            stack.enter_context(_injected(part, chosen, seed, purpose, backbone.holding))
        yield Adapters(parts, base_size)


def _text_parts(backbone: Backbone, settings: LoraSettings) -> list[tuple[nn.Module, str, list[TrainedLayer]]]:
    if not settings.text_encoder:
        return []
    text = backbone.text
    if text is None:
        raise ValueError(
            "text_encoder is on, but training has no text encoder: connect the checkpoint's CLIP to Diff2Flow Train,"
            " or switch text_encoder off"
        )
    return [
        (module, prefix, choose_text_layers(module, text.layer_names(prefix), settings))
        for prefix, module in text.modules.items()
    ]


@contextmanager
def _injected(
    network: nn.Module, layers: Sequence[TrainedLayer], seed: int, purpose: str, hold: Hold
) -> Iterator[None]:
    originals = {layer.path: network.get_submodule(layer.path) for layer in layers}
    frozen = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.requires_grad_(False)
        inject_lora(network, [layer for layer in layers if layer.rank], seed, purpose)
        for layer in layers:
            if not layer.rank:
                change = FullChange(originals[layer.path], layer.inputs, layer.widening)
                replace_layer(network, layer.path, change)
        with hold(LayerInsertion(network, originals, any(layer.dora for layer in layers))):
            yield
    finally:
        for path, module in originals.items():
            replace_layer(network, path, module)
        for parameter, required in frozen:
            parameter.requires_grad_(required)
        vars(network).pop("peft_config", None)


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

