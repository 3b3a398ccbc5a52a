"""The node that says what a LoRA trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..training.layers import GROUPS, PRESETS, WIDENINGS, LoraSettings, patterns
from .effects import tells_the_page
from .errors import names_node
from .widgets import Widget, choice, count, number, switch, text

CATEGORY = "Diff2Flow/training"


def _group_switch(default: bool, layers: str) -> Widget:
    return switch(default, f"Preset custom only: train {layers}.")


@tells_the_page
class Diff2FlowLoraConfig:
    """Which layers a LoRA trains, and how finely."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_LORA",)
    RETURN_NAMES = ("lora",)
    OUTPUT_TOOLTIPS = ("For Diff2Flow Train.",)
    SEARCH_ALIASES = ("LoRA rank", "DoRA", "rsLoRA", "full finetuning", "trainable layers")
    DESCRIPTION = (
        "What is trained. The presets are complete: rank, alpha and the group switches count for preset custom only;"
        " include, exclude, dora, rslora and text_encoder count for every preset but full."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "preset": choice(
                    (*PRESETS, "custom"),
                    "light",
                    "light: rank 16 on attention, feed-forward and projections (6.8 M parameters on"
                    " SD1.5, a 14 MB file); a pure LoRA that ComfyUI, A1111, Forge and diffusers read."
                    " paper-small: rank 64, convolutions too, first and last layer in full (61 M), for reflow."
                    " paper-base: rank 20 % of each layer (214 M), for new tasks. The two papers' presets save"
                    " whole layers (.diff), which ComfyUI and Forge read and diffusers ignores. full: no LoRA,"
                    " every parameter of the UNet; saves a whole checkpoint and needs about 20 bytes of memory a"
                    " parameter (17 GB for SD1.5 beside the activations). custom: the inputs below.",
                ),
                "rank": count(
                    16,
                    1,
                    1024,
                    "Preset custom only: rank of each layer's LoRA, without unit. 4 to 16 for a style,"
                    " 32 to 128 for more; file size and memory grow with it.",
                ),
                "alpha": number(
                    16.0,
                    1024.0,
                    0.5,
                    "Preset custom only: the LoRA counts alpha/rank times. The same as rank is usual;"
                    " half of it halves the learning rate's effect. 0: each layer's own rank.",
                    rounding=None,
                ),
            },
            "optional": {**_custom_inputs(), **_every_presets_inputs()},
        }

    @names_node("Diff2Flow LoRA Config")
    def build(
        self,
        preset: str,
        rank: int,
        alpha: float,
        rank_ratio: float = 0.0,
        self_attention: bool = True,
        cross_attention: bool = True,
        attention_out: bool = True,
        feed_forward: bool = True,
        proj: bool = True,
        conv: bool = False,
        time: bool = False,
        ends_in_full: bool = False,
        include: str = "",
        exclude: str = "",
        dora: bool = False,
        rslora: bool = False,
        text_encoder: bool = False,
        widening: str = "zeros",
    ) -> tuple[LoraSettings]:
        names = {"include": patterns(include), "exclude": patterns(exclude)}
        common = {**names, "dora": dora, "rslora": rslora, "text_encoder": text_encoder, "widening": widening}
        if preset in PRESETS:
            return (replace(PRESETS[preset], **common),)
        if preset != "custom":
            raise ValueError(f"preset must be one of {', '.join((*PRESETS, 'custom'))}, not {preset!r}")
        switches = (self_attention, cross_attention, attention_out, feed_forward, proj, time, conv)
        groups = tuple(group for group, on in zip(GROUPS, switches, strict=True) if on)
        return (LoraSettings("custom", groups, rank, rank_ratio, alpha, ends_in_full, **common),)


def _custom_inputs() -> dict[str, Any]:
    return {
        "rank_ratio": number(
            0.0,
            1.0,
            0.01,
            "Preset custom only: rank as a part of the larger side of each layer, 0 to 1, instead of"
            " rank. The paper's is 0.2. 0: rank counts.",
            rounding=None,
        ),
        "self_attention": _group_switch(True, "queries, keys and values of self-attention"),
        "cross_attention": _group_switch(True, "queries, keys and values of cross-attention (text)"),
        "attention_out": _group_switch(True, "the output layers of both attentions"),
        "feed_forward": _group_switch(True, "the feed-forward layers of the transformer blocks"),
        "proj": _group_switch(True, "proj_in and proj_out around the transformer blocks"),
        "conv": _group_switch(
            False, "all convolutions but the first and the last; in SD1.x that includes proj_in and proj_out"
        ),
        "time": _group_switch(False, "the time embedding and its projections into the blocks"),
        "ends_in_full": switch(
            False,
            "Preset custom only: train the first and the last convolution whole instead of by LoRA."
            " Saved as .diff, which ComfyUI and Forge read and diffusers ignores.",
        ),
    }


def _every_presets_inputs() -> dict[str, Any]:
    return {
        "include": text(
            "",
            "Every preset: names of layers as LoRA files have them, with * for any characters, separated"
            " by commas or lines: '*attn2*', 'up_blocks.1*' (SDXL: 'output_blocks.1*'). Only layers that match one"
            " are trained. It narrows down what the preset or the switches choose and never adds a layer. Empty:"
            " all of them. Does not concern the text encoder.",
            multiline=True,
        ),
        "exclude": text(
            "",
            "Every preset: names of layers that are not trained, written as in include, e.g."
            " '*mid_block*'. Counts after include. Empty: none is left out.",
            multiline=True,
        ),
        "dora": switch(
            False,
            "Every preset: DoRA, which trains the length of each output's weights apart from their"
            " direction; closer to full finetuning at a low rank, and slower. Saved as .dora_scale in"
            " the reading of ComfyUI and Forge; other programs weigh it differently or ignore it.",
        ),
        "rslora": switch(
            False,
            "Every preset: rank-stabilised LoRA: counts alpha/√rank times instead of alpha/rank, so that"
            " the same alpha suits every rank; useful from rank 32 on. Where alpha is the rank (paper presets) it"
            " counts √rank times: lower the learning rate by as much. Every program reads the file rightly.",
        ),
        "text_encoder": switch(
            False,
            "Every preset: also a LoRA of the same rank and alpha on the text encoder (attention and"
            " mlp), for new words and names. Connect CLIP to Diff2Flow Train; captions are then encoded in every"
            " step, which is slower.",
        ),
        "widening": choice(
            WIDENINGS,
            "zeros",
            "Depth only: how the first layer begins, which from then on takes the image, too. zeros: the image counts"
            " nothing at first, and the network begins as it was. halved: its weights halved and repeated for the"
            " image, as Marigold does.",
        ),
    }
