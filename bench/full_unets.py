"""The UNets of SD1.5, SD2.1 and SDXL in their full size, as arguments of diffusers' UNet2DConditionModel."""

from __future__ import annotations

from typing import Any

_COMMON = {"block_out_channels": (320, 640, 1280, 1280),
           "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
           "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "SD1.5": {**_COMMON, "cross_attention_dim": 768, "attention_head_dim": 8},
    "SD2.1": {**_COMMON, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
              "use_linear_projection": True},
    "SDXL": {"block_out_channels": (320, 640, 1280),
             "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
             "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
             "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
             "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}  # fmt: skip
