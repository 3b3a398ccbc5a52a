"""Which layers of a network are trained, and how: presets, target groups, ranks. No peft, no tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

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
_TEXT_LAYER = re.compile(r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_SHOWN = 4
WIDENINGS = ("zeros", "halved")
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
        include: patterns ("*", "?", "[...]") over the layers' names in LoRA files; where there are any, only layers
            of the groups (and the two ends) that match one are trained. They add nothing.
        exclude: patterns of layers that are not trained, whatever else is said.
        dora: weight-decomposed LoRA: each output's length is trained apart from its direction.
        rslora: the scale is alpha/sqrt(rank) instead of alpha/rank.
        text_encoder: a LoRA of the same rank and alpha on the text encoders' attention and mlp layers, too; groups
            and patterns do not concern it.
        full: every parameter of the network is trained, there is no LoRA.
        widening: how the first layer begins where the dataset brings an image for the network to look at (depth), of
            WIDENINGS: "zeros" gives the image's channels weights of 0, so that the network begins as it was; "halved"
            halves the weights and repeats them for the image, as Marigold does.

    Raises:
        ValueError: an unknown or no group, a rank, ratio or alpha out of range, or full beside what a LoRA has.
    """

    preset: str = "custom"
    groups: tuple[str, ...] = ("self_attention", "cross_attention", "attention_out", "feed_forward", "proj")
    rank: int = 16
    rank_ratio: float = 0.0
    alpha: float = 16.0
    ends_in_full: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    text_encoder: bool = False
    full: bool = False
    widening: str = "zeros"

    def __post_init__(self) -> None:
        if self.widening not in WIDENINGS:
            raise ValueError(f"widening must be one of {', '.join(WIDENINGS)}, not {self.widening!r}")
        if self.full:
            self._require_plain()
            return
        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown:
            raise ValueError(f"unknown target group {unknown[0]!r}; the groups are {', '.join(GROUPS)}")
        if not (self.trains_network or self.text_encoder):
            raise ValueError("nothing to train: switch on a target group, ends_in_full, or text_encoder")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}; 8 to 64 is usual")
        if not 0.0 <= self.rank_ratio <= 1.0:
            raise ValueError(f"rank_ratio must be from 0 to 1, not {self.rank_ratio}; the paper's is 0.2, 0 uses rank")
        if not 0.0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be at least 0, not {self.alpha}; give the rank's own value, or 0 for it")

    @property
    def trains_network(self) -> bool:
        """Whether layers of the diffusion network are trained, not the text encoder alone."""
        return bool(self.full or self.groups or self.ends_in_full)

    def _require_plain(self) -> None:
        for name in ("include", "exclude", "dora", "rslora", "text_encoder"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is for LoRAs, and preset 'full' trains the whole UNet without one: leave {name} empty or"
                    " off, or choose another preset"
                )


def patterns(text: str) -> tuple[str, ...]:
    """The patterns in a text, separated by commas or line ends."""
    return tuple(part.strip() for part in re.split(r"[,\n]", text) if part.strip())


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
    "full": LoraSettings(preset="full", groups=(), full=True),
}
"""light: the targets of kohya's networks.lora, pure LoRA. The paper's two are as its published code builds them:
paper-base reaches proj_in and proj_out only where they are convolutions. full is no LoRA: see `training.full`."""


@dataclass(frozen=True)
class TrainedLayer:
    """One layer to train.

    Args:
        path: dotted path of its module in the network.
        file_name: dotted name it has in LoRA files.
        rank: of its LoRA; 0: the layer is trained in full.
        alpha: of its LoRA, as set.
        size: trained parameters.
        dora, rslora: as in LoraSettings.
        inputs: channels that a layer trained in full takes from now on; 0: as many as it does.
        widening: how their weights begin, as in LoraSettings.
    """

    path: str
    file_name: str
    rank: int
    alpha: float
    size: int
    dora: bool = False
    rslora: bool = False
    inputs: int = 0
    widening: str = "zeros"

    @property
    def scale(self) -> float:
        """Factor of lora_up · lora_down: alpha/rank, for rsLoRA alpha/sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def file_alpha(self) -> float:
        """alpha as LoRA files hold it, whose readers know the scale alpha/rank only."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha


def choose_layers(
    network: nn.Module, layer_names: Mapping[str, str], settings: LoraSettings, inputs: int = 0
) -> list[TrainedLayer]:
    """The layers that `settings` train in a network, sorted by file name, so that both hosts have them in one order.

    Args:
        network: the bare network.
        layer_names: module path -> name in LoRA files (`Backbone.layer_names`).
        inputs: channels that the network is to take; 0: as many as it does.

    Raises:
        ValueError: no layer of the network is in the chosen groups, a pattern matches nothing, or there are `inputs`
            and the first layer is not trained.
    """
    layers = _layers_of(network, layer_names)
    _require_matches(settings, [name for _, name, _ in layers])
    found = [trained for each in layers if (trained := _trained(*each, settings, inputs))]
    if not found:
        raise ValueError(f"no layer of this network is in the target groups {', '.join(settings.groups)}")
    chosen = [layer for layer in found if _wanted(layer.file_name, settings)]
    if not chosen:
        raise ValueError(
            f"include and exclude leave nothing of the {len(found)} layers that preset {settings.preset!r} trains"
            f" (e.g. {_some(layer.file_name for layer in found)}); include only narrows them down: change the patterns,"
            " or switch on more target groups"
        )
    if inputs and not any(layer.inputs for layer in chosen):
        raise ValueError(
            "the dataset holds depth, for which the first layer takes the image, too, and must be trained: switch"
            " ends_in_full on, and leave that layer to include and out of exclude"
        )
    return chosen


def choose_text_layers(module: nn.Module, layer_names: Mapping[str, str], settings: LoraSettings) -> list[TrainedLayer]:
    """The layers that `settings` train in a text encoder: query, key, value, output, and both layers of the mlp.

    Args:
        module: the bare text encoder.
        layer_names: module path -> name in LoRA files (`TextBackbone.layer_names`).

    Raises:
        ValueError: the module has no such layer.
    """
    layers = _layers_of(module, layer_names)
    chosen = [_lora(*each, settings) for each in layers if _TEXT_LAYER.fullmatch(each[1])]
    if not chosen:
        raise ValueError(
            "text_encoder: this text encoder has none of CLIP's attention and mlp layers; switch text_encoder off"
        )
    return chosen


_Layer = tuple[str, str, "nn.Linear | nn.Conv2d"]


def _layers_of(network: nn.Module, layer_names: Mapping[str, str]) -> list[_Layer]:
    """(path, file name, layer) of every linear and convolution layer, sorted by file name."""
    modules = dict(network.named_modules())
    named = [(path, name, modules.get(path)) for path, name in sorted(layer_names.items(), key=lambda item: item[1])]
    return [(path, name, layer) for path, name, layer in named if isinstance(layer, (nn.Linear, nn.Conv2d))]


def _trained(
    path: str, file_name: str, layer: nn.Linear | nn.Conv2d, settings: LoraSettings, inputs: int
) -> TrainedLayer | None:
    if FIRST.fullmatch(file_name) or LAST.fullmatch(file_name):
        return _in_full(path, file_name, layer, settings, inputs) if settings.ends_in_full else None
    if not any(_in_group(file_name, layer, group) for group in settings.groups):
        return None
    return _lora(path, file_name, layer, settings)


def _in_full(
    path: str, file_name: str, layer: nn.Linear | nn.Conv2d, settings: LoraSettings, inputs: int
) -> TrainedLayer:
    inputs = inputs if FIRST.fullmatch(file_name) else 0
    weights = layer.weight.numel() // layer.weight.shape[1] * (inputs or layer.weight.shape[1])
    biases = 0 if layer.bias is None else layer.bias.numel()
    return TrainedLayer(path, file_name, 0, 0.0, weights + biases, inputs=inputs, widening=settings.widening)


def _lora(path: str, file_name: str, layer: nn.Linear | nn.Conv2d, settings: LoraSettings) -> TrainedLayer:
    outputs, inputs, *kernel = layer.weight.shape
    rank = max(1, int(settings.rank_ratio * max(inputs, outputs))) if settings.rank_ratio else settings.rank
    size = rank * (inputs * math.prod(kernel) + outputs) + (outputs if settings.dora else 0)
    return TrainedLayer(path, file_name, rank, settings.alpha or float(rank), size, settings.dora, settings.rslora)


def _in_group(file_name: str, layer: nn.Module, group: str) -> bool:
    if group == "conv":
        return isinstance(layer, nn.Conv2d)
    return _GROUP_PATTERNS[group].fullmatch(file_name) is not None


def _wanted(name: str, settings: LoraSettings) -> bool:
    included = not settings.include or any(fnmatchcase(name, pattern) for pattern in settings.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in settings.exclude)


def _require_matches(settings: LoraSettings, names: Sequence[str]) -> None:
    """Raises ValueError for a pattern that matches no layer of the network, whether it would be trained or not."""
    for kind in ("include", "exclude"):
        for pattern in getattr(settings, kind):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{kind}: the pattern {pattern!r} matches no layer of this network; its layers have names like"
                    f" {_some(names)}; '*' stands for any characters, e.g. '*attn2*'"
                )


def _some(names: Iterable[str]) -> str:
    """A few names from all over the list."""
    listed = list(names)
    step = max(1, len(listed) // _SHOWN)
    return ", ".join(f"'{name}'" for name in listed[step // 2 :: step][:_SHOWN])
