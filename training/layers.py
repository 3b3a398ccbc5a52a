"""Which layers of a network are trained, and how: presets, target groups, ranks. No peft, no tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

FIRST = re.compile(r"conv_in|input_blocks\.0\.0")
LAST = re.compile(r"conv_out|out\.2")
_GROUP_PATTERNS = {
    "self_attention": re.compile(r".*\.attn1\.to_[qkv]"),
    "cross_attention": re.compile(r".*\.attn2\.to_[qkv]"),
    "attention_out": re.compile(r".*\.attn[12]\.to_out\.0"),
    "feed_forward": re.compile(r".*\.ff\.net\.(0\.proj|2)"),
    "proj": re.compile(r".*\.proj_(in|out)"),
    "time": re.compile(r"(time_embed|time_embedding|add_embedding|label_emb)\..*|.*\.(time_emb_proj|emb_layers\.1)"),
}
GROUPS = (*_GROUP_PATTERNS, "conv")
"""Target groups. "conv" is every convolution but the first and the last, 1×1 ones too, hence also the proj_in and
proj_out of SD1.x, which are convolutions there."""


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA trains.

    Args:
        preset: the name it goes by in metadata.
        groups: target groups, of GROUPS.
        rank: of every LoRA layer, at least 1; ignored where rank_ratio is set.
        rank_ratio: rank as a part of the larger side of each layer, in [0, 1]; 0 uses `rank`.
        alpha: the LoRA's scale is alpha/rank; 0 takes the layer's own rank (scale 1).
        ends_in_full: first and last convolution are trained whole, weight and bias.

    Raises:
        ValueError: an unknown or no group, a rank, ratio or alpha out of range.
    """

    preset: str = "custom"
    groups: tuple[str, ...] = ("self_attention", "cross_attention", "attention_out", "feed_forward", "proj")
    rank: int = 16
    rank_ratio: float = 0.0
    alpha: float = 16.0
    ends_in_full: bool = False

    def __post_init__(self) -> None:
        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown:
            raise ValueError(f"unknown target group {unknown[0]!r}; the groups are {', '.join(GROUPS)}")
        if not self.groups and not self.ends_in_full:
            raise ValueError("nothing to train: switch on a target group, or first and last layer in full")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}; 8 to 64 is usual")
        if not 0.0 <= self.rank_ratio <= 1.0:
            raise ValueError(f"rank_ratio must be from 0 to 1, not {self.rank_ratio}; the paper's is 0.2, 0 uses rank")
        if not 0.0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be at least 0, not {self.alpha}; give the rank's own value, or 0 for it")


PRESETS = {
    "light": LoraSettings(preset="light"),
    "paper-small": LoraSettings(
        preset="paper-small",
        groups=("self_attention", "cross_attention", "feed_forward", "proj", "conv"),
        rank=64,
        alpha=0.0,
        ends_in_full=True,
    ),
    "paper-base": LoraSettings(
        preset="paper-base",
        groups=("self_attention", "cross_attention", "conv"),
        rank_ratio=0.2,
        alpha=0.0,
        ends_in_full=True,
    ),
}
"""light: the targets of kohya's networks.lora, pure LoRA. The paper's two are as its published code builds them:
paper-base reaches proj_in and proj_out only where they are convolutions."""


@dataclass(frozen=True)
class TrainedLayer:
    """One layer to train.

    Args:
        path: dotted path of its module in the network.
        file_name: dotted name it has in LoRA files.
        rank: of its LoRA; 0: the layer is trained in full.
        alpha: of its LoRA.
        size: trained parameters.
    """

    path: str
    file_name: str
    rank: int
    alpha: float
    size: int


def choose_layers(network: nn.Module, layer_names: Mapping[str, str], settings: LoraSettings) -> list[TrainedLayer]:
    """The layers that `settings` train in a network, sorted by file name, so that both hosts have them in one order.

    Args:
        network: the bare network.
        layer_names: module path -> name in LoRA files (`Backbone.layer_names`).

    Raises:
        ValueError: no layer of the network is in the chosen groups.
    """
    modules = dict(network.named_modules())
    chosen = []
    for path, file_name in sorted(layer_names.items(), key=lambda item: item[1]):
        layer = modules.get(path)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            trained = _trained(path, file_name, layer, settings)
            if trained:
                chosen.append(trained)
    if not chosen:
        raise ValueError(f"no layer of this network is in the target groups {', '.join(settings.groups)}")
    return chosen


def _trained(path: str, file_name: str, layer: nn.Linear | nn.Conv2d, settings: LoraSettings) -> TrainedLayer | None:
    if FIRST.fullmatch(file_name) or LAST.fullmatch(file_name):
        size = layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
        return TrainedLayer(path, file_name, 0, 0.0, size) if settings.ends_in_full else None
    if not any(_in_group(file_name, layer, group) for group in settings.groups):
        return None
    outputs, inputs, *kernel = layer.weight.shape
    rank = max(1, int(settings.rank_ratio * max(inputs, outputs))) if settings.rank_ratio else settings.rank
    area = kernel[0] * kernel[1] if kernel else 1
    return TrainedLayer(path, file_name, rank, settings.alpha or float(rank), rank * (inputs * area + outputs))


def _in_group(file_name: str, layer: nn.Module, group: str) -> bool:
    if group == "conv":
        return isinstance(layer, nn.Conv2d)
    return _GROUP_PATTERNS[group].fullmatch(file_name) is not None
