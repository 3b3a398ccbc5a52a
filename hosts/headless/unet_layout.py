"""A UNet's shape and names, read off the keys of an LDM-layout checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..port import HostError

PREFIX = "model.diffusion_model."
RUNS = "SD1.x, SD2.x and SDXL base checkpoints"
"""What headless runs, in messages."""

SIZES = 6
"""Numbers of pixels that SDXL is told: original height and width, crop's top and left, target height and width."""
SIZE_WIDTH = 256
"""Width of the embedding of each of them."""

_FAMILY_BY_CONTEXT = {768: "SD1", 1024: "SD2"}
_OTHERS_BY_CONTEXT = {1024: "an SD unCLIP checkpoint", 1280: "an SDXL refiner"}
"""Networks that take a vector beside the text and are not SDXL."""
_SD1_HEADS = 8
_HEAD_SIZE = 64
_FIXED = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass
class Level:
    """One resolution of the UNet: `blocks` resnets; transformer depths of its down and up blocks (0: no attention)."""

    channels: int
    blocks: int = 0
    down: list[int] = field(default_factory=list)
    up: list[int] = field(default_factory=list)


class UnetLayout:
    """What a UNet's keys imply.

    Args:
        weights: its tensors without the prefix ("input_blocks.0.0.weight").
        where: the file's name, for messages.

    Attributes:
        family: "SD1" or "SD2" by the width of the text context, "SDXL" where a vector is taken beside it.
        pooled_width: of the pooled text embedding that the network takes; 0 where it takes none.
        config: arguments of diffusers' UNet2DConditionModel.
        parameters: the names of the weights, as given.
        blocks: LDM module prefix -> diffusers module prefix ("input_blocks.1.0" -> "down_blocks.0.resnets.0").

    Raises:
        HostError: no SD1, SD2 or SDXL UNet, or one that diffusers' blocks cannot express.
    """

    def __init__(self, weights: Mapping[str, Tensor], where: str) -> None:
        self._weights, self._where = weights, where
        self.parameters = tuple(weights)
        self.blocks = dict(_FIXED)
        self.levels = self._down()
        self._up()
        self.context_width = self._context_width()
        self.pooled_width = max(0, self._vector() - SIZES * SIZE_WIDTH)
        self.family = self._family()
        self.config = self._config()

    def to_diffusers(self, name: str) -> str:
        """diffusers' name of an LDM parameter or module name; itself if it is not part of the UNet."""
        parts = name.split(".")
        for length in (4, 3, 2):
            block = ".".join(parts[:length])
            if block in self.blocks:
                return ".".join(filter(None, (self.blocks[block], self._inner(self.blocks[block], parts[length:]))))
        return name

    def _inner(self, block: str, parts: list[str]) -> str:
        if ".resnets." not in block:
            return ".".join(parts)
        for length in (2, 1):
            known = _RESNET.get(".".join(parts[:length]))
            if known:
                return ".".join([known, *parts[length:]])
        return ".".join(parts)

    def _down(self) -> list[Level]:
        levels = [Level(self._shape("input_blocks.0.0.weight")[0])]
        for i in range(1, self._count("input_blocks")):
            level, number = levels[-1], len(levels) - 1
            if f"input_blocks.{i}.0.op.weight" in self._weights:
                self.blocks[f"input_blocks.{i}.0.op"] = f"down_blocks.{number}.downsamplers.0.conv"
                levels.append(Level(level.channels))
                continue
            level.channels = self._shape(f"input_blocks.{i}.0.out_layers.3.weight")[0]
            self._name_pair(f"input_blocks.{i}", f"down_blocks.{number}", level.blocks)
            level.down.append(self._depth(f"input_blocks.{i}.1"))
            level.blocks += 1
        return levels

    def _up(self) -> None:
        i = 0
        for number, level in enumerate(reversed(self.levels)):
            for block in range(level.blocks + 1):
                self._shape(f"output_blocks.{i}.0.out_layers.3.weight")
                self._name_pair(f"output_blocks.{i}", f"up_blocks.{number}", block)
                level.up.append(self._depth(f"output_blocks.{i}.1"))
                for place in (1, 2):
                    if f"output_blocks.{i}.{place}.conv.weight" in self._weights:
                        self.blocks[f"output_blocks.{i}.{place}"] = f"up_blocks.{number}.upsamplers.0"
                i += 1

    def _name_pair(self, ldm: str, diffusers: str, block: int) -> None:
        self.blocks[f"{ldm}.0"] = f"{diffusers}.resnets.{block}"
        self.blocks[f"{ldm}.1"] = f"{diffusers}.attentions.{block}"

    def _context_width(self) -> int:
        context = [name for name in self._weights if name.endswith("attn2.to_k.weight")]
        return self._shape(context[0])[1] if context else 0

    def _vector(self) -> int:
        """Width of the vector that is taken beside the text; 0 if there is none."""
        return self._shape("label_emb.0.0.weight")[1] if "label_emb.0.0.weight" in self._weights else 0

    def _family(self) -> str:
        width, vector = self.context_width, self._vector()
        if "label_emb.weight" in self._weights:
            raise HostError(f"'{self._where}' is an upscaler, which takes a level of noise: headless runs {RUNS}")
        if self.pooled_width and width not in (0, *_FAMILY_BY_CONTEXT, *_OTHERS_BY_CONTEXT):
            return "SDXL"
        if vector or width not in _FAMILY_BY_CONTEXT:
            raise HostError(f"'{self._where}' is {_other_family(width, vector)}: headless runs {RUNS}")
        return _FAMILY_BY_CONTEXT[width]

    def _config(self) -> dict[str, Any]:
        channels = tuple(level.channels for level in self.levels)
        depths = [self._depths(level.down, "down") for level in self.levels]
        up_depths = [self._depths(level.up, "up") for level in reversed(self.levels)]
        middle, depths_used = self._middle(depths)
        heads = _SD1_HEADS if self.family == "SD1" else tuple(max(1, c // _HEAD_SIZE) for c in channels)
        proj_in = next(n for n in self._weights if n.endswith(".1.proj_in.weight"))
        return self._vector_config() | {
            "in_channels": self._shape("input_blocks.0.0.weight")[1],
            "out_channels": self._shape("out.2.weight")[0],
            "block_out_channels": channels,
            "layers_per_block": tuple(level.blocks for level in self.levels),
            "down_block_types": tuple("CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in depths),
            "up_block_types": tuple("CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in up_depths),
            "mid_block_type": middle,
            "transformer_layers_per_block": depths_used,
            "reverse_transformer_layers_per_block": tuple(up_depths),
            "attention_head_dim": heads,
            "cross_attention_dim": self.context_width,
            "use_linear_projection": len(self._shape(proj_in)) == 2,
        }

    def _vector_config(self) -> dict[str, Any]:
        if not self.pooled_width:
            return {}
        return {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": self._vector(),
        }

    def _middle(self, depths: list[tuple[int, ...]]) -> tuple[str | None, tuple[tuple[int, ...], ...]]:
        """The middle block's class, and the depths with the middle's where diffusers looks for it: last level, first.

        Raises:
            HostError: that place is taken by another depth.
        """
        if "middle_block.0.in_layers.0.weight" not in self._weights:
            return None, tuple(depths)
        depth = self._depth("middle_block.1")
        if not depth:
            return "UNetMidBlock2D", tuple(depths)
        last = depths[-1]
        if last and last[0] not in (0, depth):
            raise HostError(
                f"'{self._where}' has {depth} transformer layers in the middle of its UNet and {last[0]} before:"
                " not supported"
            )
        return "UNetMidBlock2DCrossAttn", (*depths[:-1], (depth, *last[1:]))

    def _depths(self, depths: list[int], side: str) -> tuple[int, ...]:
        if any(depths) and not all(depths):
            raise HostError(
                f"'{self._where}' mixes {side} blocks with and without attention on one level: not supported"
            )
        return tuple(depths)

    def _depth(self, block: str) -> int:
        return self._count(f"{block}.transformer_blocks") if f"{block}.proj_in.weight" in self._weights else 0

    def _count(self, prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, self._weights) if m), default=-1)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._weights:
            raise HostError(
                f"'{self._where}' lacks the weight '{PREFIX}{name}': the file is incomplete or not a Stable Diffusion"
                " checkpoint; copy it again or choose another"
            )
        return tuple(self._weights[name].shape)


def _other_family(width: int, vector: int) -> str:
    if vector and width in _OTHERS_BY_CONTEXT:
        return _OTHERS_BY_CONTEXT[width]
    beside = f" and a vector of {vector} beside it" if vector else ""
    return f"a UNet with text context of width {width}{beside}" if width else "a UNet without text context"


def family_of_keys(keys: Iterable[str]) -> str:
    """What kind of file has such keys, in words, where it is no LDM-layout checkpoint."""
    marks = (
        ("joint_blocks.", "an SD3 checkpoint"),
        ("double_blocks.", "a FLUX checkpoint"),
        ("double_stream_blocks.", "a HiDream checkpoint"),
        ("down_blocks.", "a UNet in diffusers' layout without its text encoder and autoencoder"),
        (".lora_down.weight", "a LoRA (it belongs in the folder 'loras')"),
        (".lora_A.weight", "a LoRA (it belongs in the folder 'loras')"),
        ("transformer_blocks.", "a diffusion transformer"),
        ("text_model.", "a text encoder"),
        ("decoder.conv_in.", "an autoencoder (VAE)"),
        ("taesd_", "a tiny autoencoder"),
    )
    listed = list(keys)
    return next((words for mark, words in marks if any(mark in key for key in listed)), "something else")
