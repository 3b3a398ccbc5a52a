"""Single trained layers: LoRA and DoRA layers made by peft, layers trained in full, and their tensors in LoRA files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..alignment.precision import FLOAT64
from .draws import generator
from .layers import TrainedLayer

_ADAPTER = "default"
_WIDE = (torch.float32, FLOAT64, torch.bfloat16, torch.float16)


class FullChange(nn.Module):
    """A linear or convolution layer trained in full: base(x) + layer of (weight_change, bias_change), both 0 at first.

    Training the change instead of the weight keeps the frozen layer untouched, its storage format too, and makes
    weight decay pull towards the base model.

    A layer that is widened takes more input channels than its base does, which goes on seeing the first ones alone.

    Args:
        base: the frozen layer.
        inputs: channels that it takes; 0: as many as the base.
        widening: how the weights of added channels begin: "zeros", or "halved": W/2 of the base for its own channels
            and W/2 again for the added ones, of which there are then as many.

    Raises:
        ValueError: fewer inputs than the base has, or "halved" where they are not twice as many.
    """

    def __init__(self, base: nn.Module, inputs: int = 0, widening: str = "zeros") -> None:
        super().__init__()
        self.base: Any = base
        self.weight_change = nn.Parameter(_first_change(base.weight, inputs or base.weight.shape[1], widening))
        self._widened = self.weight_change.shape != base.weight.shape
        bias = getattr(base, "bias", None)
        self.bias_change = None if bias is None else nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))
        self._enabled = True

    def enable_adapters(self, enabled: bool) -> None:
        """Whether the change counts, as peft's layers have it."""
        self._enabled = enabled

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a layer for its dtype, device or shape; the change's where widened."""
        return self.weight_change if self._widened else self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + change(x), in the dtype of base(x); base(x) alone while the change is switched off."""
        y = self.base(x[:, : self.base.weight.shape[1]] if self._widened else x)
        if not self._enabled:
            return y
        return y + self._change(x.to(self.weight_change.dtype)).to(y.dtype)

    def _change(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return functional.linear(x, self.weight_change, self.bias_change)
        base = self.base
        return functional.conv2d(
            x, self.weight_change, self.bias_change, base.stride, base.padding, base.dilation, base.groups
        )


def _first_change(weight: Tensor, inputs: int, widening: str) -> Tensor:
    """What is added to a weight (out, in, ...) that is padded with zeros to `inputs`, float32, before training."""
    outputs, own, *kernel = weight.shape
    if inputs < own or (widening == "halved" and inputs not in (own, 2 * own)):
        raise ValueError(f"a layer of {own} input channels cannot be widened to {inputs} by widening '{widening}'")
    change = torch.zeros(outputs, inputs, *kernel, dtype=torch.float32, device=weight.device)
    if widening == "halved" and inputs > own:
        half = weight.detach().float() / 2
        change[:, :own], change[:, own:] = -half, half
    return change


def inject_lora(network: nn.Module, layers: Sequence[TrainedLayer], seed: int, purpose: str) -> None:
    """Wraps the layers by peft and draws their weights; torch's global generator is left as it was.

    The base layers stay the same objects, their weights in the same memory; every added weight is float32.

    Args:
        network: the bare network.
        layers: each with a rank.
        seed: of the run.
        purpose: of the draw; other purposes draw other weights.

    Raises:
        ValueError: DoRA on weights in an 8-bit format, or that are all 0 for an output.
    """
    if not layers:
        return
    from peft import LoraConfig, inject_adapter_in_model

    for layer in layers:
        if layer.dora:
            _require_lengths(network.get_submodule(layer.path).weight, layer)
    config = LoraConfig(
        r=layers[0].rank,
        lora_alpha=layers[0].alpha,
        target_modules=f"(?:{_any_of(layers)})",
        rank_pattern=_pattern(layers, "rank"),
        alpha_pattern=_pattern(layers, "alpha"),
        use_dora=layers[0].dora,
        use_rslora=layers[0].rslora,
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, network, adapter_name=_ADAPTER)
    draw = generator(seed, purpose)
    for layer in layers:
        _initialise(network.get_submodule(layer.path), layer, draw)


def trained_tensors(module: Any, layer: TrainedLayer) -> dict[str, nn.Parameter]:
    """The trained parameters of an injected layer, by what their keys in LoRA files end in."""
    if not layer.rank:
        biases = {} if module.bias_change is None else {"diff_b": module.bias_change}
        return {"diff": module.weight_change, **biases}
    down, up = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
    lengths = {"dora_scale": module.lora_magnitude_vector[_ADAPTER].weight} if layer.dora else {}
    return {"lora_down.weight": down, "lora_up.weight": up, **lengths}


def file_tensors(module: Any, layer: TrainedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """An injected layer as a LoRA file holds it, on the CPU: weights in `dtype`, alpha and dora_scale in float32.

    Raises:
        ValueError: a weight that is not finite in `dtype`.
    """
    tensors = {}
    parts = trained_tensors(module, layer)
    if layer.inputs:
        parts = {**_of_full_rank(parts.pop("diff")), **parts}
    for ending, tensor in parts.items():
        if ending != "dora_scale":
            tensors[ending] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if layer.dora:
        tensors["dora_scale"] = _dora_scale(module, layer, tensors)
    for tensor in tensors.values():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the trained weights of layer '{layer.file_name}' are not finite in {dtype}")
    if layer.rank:
        tensors["alpha"] = torch.tensor(layer.file_alpha, dtype=torch.float32)
    if layer.inputs:
        tensors["alpha"] = torch.tensor(float(len(tensors["lora_down.weight"])), dtype=torch.float32)
        tensors["reshape_weight"] = torch.tensor(module.weight_change.shape)
    return tensors


def _of_full_rank(change: Tensor) -> dict[str, Tensor]:
    """A change (out, in, h, w) as lora_up · lora_down without loss, one of them the identity.

    `reshape_weight` widens a weight in ComfyUI only where a LoRA layer is added to it, not a `diff`.
    """
    outputs, *kernel = change.shape
    columns = math.prod(kernel)
    if columns <= outputs:
        up, down = change.reshape(outputs, columns), torch.eye(columns, device=change.device)
    else:
        up, down = torch.eye(outputs, device=change.device), change.reshape(outputs, columns)
    return {"lora_down.weight": down.reshape(-1, *kernel), "lora_up.weight": up[..., None, None]}


def _dora_scale(module: Any, layer: TrainedLayer, stored: dict[str, Tensor]) -> Tensor:
    """dora_scale (out, 1, ...) of DoRA's lengths m (out,), for ComfyUI and Forge.

    DoRA is m · (W + D)/|W + D| with D = scale · up · down and the norm over each output's weights. ComfyUI computes
    dora_scale · (W + D)/|W| instead where dora_scale has one entry for each output: so dora_scale = m · |W|/|W + D|.
    """
    weight = module.get_base_layer().weight.detach().to("cpu", torch.float32)
    lengths = trained_tensors(module, layer)["dora_scale"].detach().to("cpu", torch.float32).flatten()
    up, down = stored["lora_up.weight"].float().flatten(1), stored["lora_down.weight"].float().flatten(1)
    changed = weight.flatten(1) + layer.scale * (up @ down)
    scale = lengths * weight.flatten(1).norm(dim=1) / changed.norm(dim=1)
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _require_lengths(weight: Tensor, layer: TrainedLayer) -> None:
    if weight.dtype not in _WIDE:
        raise ValueError(
            f"dora: layer '{layer.file_name}' is stored in {str(weight.dtype).removeprefix('torch.')}, too coarse for"
            " DoRA; load the checkpoint in fp16, bf16 or fp32, or switch dora off"
        )
    if not weight.is_meta and not weight.flatten(1).any(dim=1).all():
        raise ValueError(
            f"dora: layer '{layer.file_name}' has an output whose weights are all 0, which has no direction; name it"
            " in exclude, or switch dora off"
        )


def _initialise(module: Any, layer: TrainedLayer, draw: torch.Generator) -> None:
    """lora_down He-uniform (as kohya and peft), drawn on the CPU; lora_up 0; DoRA's lengths |W|; all float32."""
    down, up = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
    if down.weight.shape[0] != layer.rank or module.scaling[_ADAPTER] != layer.scale:
        raise ValueError(f"the installed peft gave layer '{layer.file_name}' another rank or alpha; update peft")
    down.float()
    up.float()
    if down.weight.is_meta:
        return
    values = nn.init.kaiming_uniform_(torch.empty(down.weight.shape), a=math.sqrt(5), generator=draw)
    with torch.no_grad():
        down.weight.copy_(values)
        up.weight.zero_()
        if layer.dora:
            _initialise_lengths(module, layer)


def _initialise_lengths(module: Any, layer: TrainedLayer) -> None:
    """DoRA's lengths by peft's own norm in float32, so that a fresh layer's factor is exactly 1; peft's are rounded."""
    dora, weight = module.lora_magnitude_vector[_ADAPTER].float(), module.get_base_layer().weight
    nothing = torch.zeros((), device=weight.device)
    dora.weight.copy_(dora.get_weight_norm(weight.float(), nothing, layer.scale))


def _pattern(layers: Sequence[TrainedLayer], attribute: str) -> dict[str, Any]:
    """peft's {regex: value}, one entry for each value; the caret keeps peft from matching the ends of longer paths."""
    values = {getattr(layer, attribute) for layer in layers}
    return {
        f"^(?:{_any_of([layer for layer in layers if getattr(layer, attribute) == value])})": value
        for value in sorted(values)
    }


def _any_of(layers: Sequence[TrainedLayer]) -> str:
    return "|".join(layer.path.replace(".", r"\.") for layer in layers)
