"""LoRA layers put into a network by peft, and taken out again without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .draws import generator
from .layers import TrainedLayer

_ADAPTER = "default"
_PREFIX = "lora_unet_"


class Adapters:
    """The trainable layers inside a network.

    Args:
        network: with the layers injected.
        layers: which they are.
    """

    def __init__(self, network: nn.Module, layers: Sequence[TrainedLayer]) -> None:
        self.layers = list(layers)
        self._modules = {layer.file_name: network.get_submodule(layer.path) for layer in layers}

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(layer.size for layer in self.layers)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, float32, in a fixed order."""
        return [p for layer in self.layers for p in self._tensors(layer).values()]

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights as LoRA files hold them (kohya's keys), on the CPU, in `dtype`; alphas in float32.

        weight = base + alpha/rank · lora_up · lora_down; in full: weight = base + diff, bias = base + diff_b.

        Raises:
            ValueError: a weight that is not finite in `dtype`.
        """
        state = {}
        for layer in self.layers:
            key = _PREFIX + layer.file_name.replace(".", "_")
            for ending, tensor in self._tensors(layer).items():
                state[f"{key}.{ending}"] = _finite(
                    tensor.detach().to("cpu", dtype, copy=True).contiguous(), layer, dtype
                )
            if layer.rank:
                state[f"{key}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
        return state

    def _tensors(self, layer: TrainedLayer) -> dict[str, nn.Parameter]:
        module: Any = self._modules[layer.file_name]
        if not layer.rank:
            biases = {} if module.bias_change is None else {"diff_b": module.bias_change}
            return {"diff": module.weight_change, **biases}
        down, up = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
        return {"lora_down.weight": down, "lora_up.weight": up}


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
    originals = {layer.path: network.get_submodule(layer.path) for layer in layers}
    frozen = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.requires_grad_(False)
        _inject_lora(network, [layer for layer in layers if layer.rank], seed)
        for layer in layers:
            if not layer.rank:
                _replace(network, layer.path, FullChange(originals[layer.path]))
        yield Adapters(network, layers)
    finally:
        for path, module in originals.items():
            _replace(network, path, module)
        for parameter, required in frozen:
            parameter.requires_grad_(required)
        vars(network).pop("peft_config", None)


class FullChange(nn.Module):
    """A linear or convolution layer trained in full: base(x) + layer of (weight_change, bias_change), both 0 at first.

    Training the change instead of the weight keeps the frozen layer untouched, its storage format too, and makes
    weight decay pull towards the base model.

    Args:
        base: the frozen layer.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base
        self.weight_change = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))
        bias = getattr(base, "bias", None)
        self.bias_change = None if bias is None else nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + change(x), in the dtype of base(x)."""
        y = self.base(x)
        return y + self._change(x.to(self.weight_change.dtype)).to(y.dtype)

    def _change(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return functional.linear(x, self.weight_change, self.bias_change)
        base = self.base
        return functional.conv2d(
            x, self.weight_change, self.bias_change, base.stride, base.padding, base.dilation, base.groups
        )


def _inject_lora(network: nn.Module, layers: Sequence[TrainedLayer], seed: int) -> None:
    """Wraps the layers by peft and draws their weights; torch's global generator is left as it was."""
    if not layers:
        return
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=layers[0].rank,
        lora_alpha=layers[0].alpha,
        target_modules=f"(?:{_any_of(layers)})",
        rank_pattern=_pattern(layers, "rank"),
        alpha_pattern=_pattern(layers, "alpha"),
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, network, adapter_name=_ADAPTER)
    draw = generator(seed, "lora")
    for layer in layers:
        _initialise(network.get_submodule(layer.path), layer, draw)


def _pattern(layers: Sequence[TrainedLayer], attribute: str) -> dict[str, Any]:
    """peft's {regex: value}, one entry for each value; the caret keeps peft from matching the ends of longer paths."""
    values = {getattr(layer, attribute) for layer in layers}
    return {
        f"^(?:{_any_of([layer for layer in layers if getattr(layer, attribute) == value])})": value
        for value in sorted(values)
    }


def _any_of(layers: Sequence[TrainedLayer]) -> str:
    return "|".join(layer.path.replace(".", r"\.") for layer in layers)


def _initialise(module: Any, layer: TrainedLayer, draw: torch.Generator) -> None:
    """lora_down He-uniform (as kohya and peft), drawn on the CPU; lora_up 0; both float32."""
    down, up = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
    if down.weight.shape[0] != layer.rank or module.scaling[_ADAPTER] != layer.alpha / layer.rank:
        raise ValueError(f"the installed peft gave layer '{layer.file_name}' another rank or alpha; update peft")
    down.float()
    up.float()
    if down.weight.is_meta:
        return
    values = nn.init.kaiming_uniform_(torch.empty(down.weight.shape), a=math.sqrt(5), generator=draw)
    with torch.no_grad():
        down.weight.copy_(values)
        up.weight.zero_()


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent)._modules[name] = module


def _finite(tensor: Tensor, layer: TrainedLayer, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"the trained weights of layer '{layer.file_name}' are not finite in {dtype}")
    return tensor
