"""What training asks of a host: a backbone and a progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..alignment import NoiseSchedule


class TextBackbone(Protocol):
    """A checkpoint's text encoders, ready for gradients.

    Attributes:
        modules: the encoders by the prefix of their keys in LoRA files: "lora_te" for SD1 and SD2, "lora_te1" and
            "lora_te2" for SDXL. LoRA layers are injected into them.
    """

    modules: Mapping[str, nn.Module]

    def layer_names(self, prefix: str) -> Mapping[str, str]:
        """Dotted module path in `modules[prefix]` -> dotted name ("text_model.encoder.layers.0.self_attn.q_proj")."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Context (B, tokens, width) and pooled output (B, width) or None, with gradients, on the encoder's device.

        Contexts of unequal length are repeated to a common one, as in `LatentDataset.batch`.
        """


class Backbone(Protocol):
    """A diffusion network that can be trained.

    Attributes:
        module: the network; LoRA layers are injected into it.
        family: "SD1", "SD2" or "SDXL".
        prediction: what the network predicts, "eps" or "v".
        schedule: its noise schedule.
        device, dtype: where it runs and the dtype that its inputs are cast to; preset full sets it to float32 while
            it trains.
        base_name, base_hash: name and content hash of the checkpoint it came from ("" where unknown).
        base_path: file of that checkpoint, None where unknown.
        text: its text encoders, None where training was entered without a CLIP.
    """

    module: nn.Module
    family: str
    prediction: str
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    base_name: str
    base_hash: str
    base_path: Path | None
    text: TextBackbone | None

    def __call__(self, x_diff: Tensor, tau: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The network's output (B, *dims) at x_diff (B, *dims), fractional tau (B,)."""

    def conditioning(self, context: Tensor, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
        """What the network takes beside x and tau, for a batch.

        Args:
            context: (B, tokens, width).
            pooled: (B, width), where the text encoder has one.
            sizes: (B, 6) pixels, SDXL's: original height and width, crop's top and left, target height and width.
        """

    def scale_latent(self, latent: Tensor) -> Tensor:
        """x_data: the autoencoder's latent in the network's scale."""

    def unscale_latent(self, x_data: Tensor) -> Tensor:
        """The inverse of scale_latent."""

    def layer_names(self) -> Mapping[str, str]:
        """Dotted module path in `module` -> dotted name the layer has in LoRA files.

        SD1 and SD2: diffusers' names ("down_blocks.0.attentions.0.proj_in"); SDXL: SGM's ("input_blocks.4.1.proj_in").
        """

    def sampled(self) -> AbstractContextManager[Any]:
        """A MODEL of the host that samples through `module` as it is now; training goes on when the context ends."""

    def checkpoint_names(self) -> Mapping[str, str]:
        """Dotted parameter path in `module` -> key in the checkpoint ("model.diffusion_model.out.2.weight")."""


class Progress(Protocol):
    """A progress bar. `update` raises the host's own interruption when the user asked to stop."""

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        """Shows `done` of the total, a short text, and where the host can, a preview (PIL image)."""

    def event(self, entry: Mapping[str, Any]) -> None:
        """Tells the page, where there is one, what happened: {"kind": "step", "step": 12, "loss": 0.1, ...}."""

    def close(self) -> None:
        """Ends the bar."""
