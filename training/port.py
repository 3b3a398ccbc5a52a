"""What training asks of a host: a backbone and a progress bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..alignment import NoiseSchedule

if TYPE_CHECKING:
    from .dataset import Batch
    from .identity import Facts
    from .insertion import Insertion


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

        Contexts of unequal length are continued to the longest one, see `contexts.padded`.
        """


class Backbone(Protocol):
    """A diffusion network that can be trained.

    Attributes:
        module: the network; LoRA layers are injected into it.
        family: "SD1", "SD2" or "SDXL".
        prediction: what the network predicts, "eps" or "v".
        schedule: its noise schedule.
        device, dtype: where it runs and the dtype that it computes in, which its inputs are cast to; float32 while it
            is trained in full or with precision fp32. Never asked of a parameter: trained ones are float32 always.
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
        """The network's output (B, *dims) at x_diff (B, *dims), fractional tau (B,).

        `conditioning` is what `conditioning` returns, and where the network looks at an image also "image", its latent
        (B, *dims) in the network's scale, which goes into the first layer behind x_diff.
        """

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

    def holding(self, insertion: Insertion) -> AbstractContextManager[None]:
        """Keeps an insertion in its network while the context lasts, whatever the host does with the network.

        Whenever the host moves, merges or restores the weights, the insertion is taken out first and put back after.
        """

    def ready(self) -> None:
        """Makes sure, before a call, that the networks are on their device as training needs them, whatever has been
        done with them since the call before; nothing is done where they are."""

    def free_memory(self) -> None:
        """Gives back to the device what nobody uses, after memory ran out."""

    def sampled(self) -> AbstractContextManager[Any]:
        """A MODEL of the host that samples through `module` as it is now; training goes on when the context ends."""

    def checkpoint_names(self) -> Mapping[str, str]:
        """Dotted parameter path in `module` -> key in the checkpoint ("model.diffusion_model.out.2.weight")."""


@dataclass(frozen=True)
class Source:
    """A folder that training data is from, for the metadata.

    Args:
        count: images in it.
        repeats: how often each counts in an epoch.
        tags: how often each comma-separated part of the captions occurs.
    """

    count: int
    repeats: int = 1
    tags: Counter[str] = field(default_factory=Counter)


class TrainingDataset(Protocol):
    """What D2F_DATASET carries: `dataset.LatentDataset` or `pair_dataset.PairDataset`.

    Attributes:
        name: of its folder.
        buckets: indices of the items of each size; an item as often as it counts in an epoch.
        bucket_counts: for each size (width, height) in pixels, how many an epoch has of it, in the buckets' order.
        nominal_size: (width, height), pixels.
        largest, longest: index of an item with the most pixels, and of one with the longest context.
        latent_channels: C of the latents.
        context_width: of the text embeddings.
        mirrored: whether there are mirrored latents.
        has_noise: whether each item has its own noise, so that it is a reflow pair.
        image_channels: C of the latents of images that the network looks at (depth); 0 where there are none.
        sources: the folders that it is from, by name.
    """

    name: str
    buckets: Sequence[Sequence[int]]
    bucket_counts: Mapping[tuple[int, int], int]
    nominal_size: tuple[int, int]
    largest: int
    longest: int
    latent_channels: int
    context_width: int
    mirrored: bool
    has_noise: bool
    image_channels: int
    sources: Mapping[str, Source]

    def batch(
        self, indices: Sequence[int], flipped: Sequence[bool] | None = None, dropped: Sequence[bool] | None = None
    ) -> Batch:
        """The items at `indices`, of one size: `flipped` mirrored where that is kept, `dropped` without caption."""

    def captions(self) -> Iterator[str]:
        """The caption of every item, as a prompt."""

    def split(self, share: float, seed: int) -> tuple[TrainingDataset, TrainingDataset]:
        """Training and held-out part; ValueError where nothing can be held out."""

    def identity(self) -> str:
        """Digest of everything that a run on it depends on."""

    def facts(self) -> Facts:
        """What `identity` depends on, in words."""

    def summary(self) -> str:
        """What is in it, in a few lines."""


class Progress(Protocol):
    """A progress bar. `update` raises the host's own interruption when the user asked to stop."""

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        """Shows `done` of the total, a short text, and where the host can, a preview (PIL image)."""

    def event(self, entry: Mapping[str, Any]) -> None:
        """Tells the page, where there is one, what happened: {"kind": "step", "step": 12, "loss": 0.1, ...}."""

    def command(self) -> str:
        """What the page asks for since the last call: "save" (now), "stop" (and save), or "" where it asks nothing."""

    def close(self) -> None:
        """Ends the bar."""
