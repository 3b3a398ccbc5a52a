"""The CLIP socket: prompts to CONDITIONING, through one text encoder or SDXL's two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...training.transfer import to_device
from ..port import HostError
from . import prompts
from .tokens import tokenize
from .towers import Tower, read_towers
from .weights import Patch, Weights

_STORED = torch.float16
"""Precision that merged LoRAs are rounded to, as ComfyUI keeps text encoders in it."""


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The text encoders of a checkpoint with their patches.

    Args:
        weights: `Tower`s by key, in an nn.ModuleDict; their contexts are put side by side in its order.
        family: "SD1", "SD2" or "SDXL".
        patches: LoRAs, in the order they were applied.
        path: of the checkpoint that it came from.
    """

    weights: Weights
    family: str
    patches: tuple[Patch, ...] = ()
    path: Path | None = None

    @property
    def towers(self) -> Mapping[str, Tower]:
        """The encoders without patches, by key: "l" (CLIP-L), "h" (OpenCLIP-H) or "g" (OpenCLIP-bigG)."""
        return dict(self.weights.module.items())  # type: ignore[operator]

    def with_patches(self, patches: tuple[Patch, ...]) -> TextEncoder:
        """A clone with more patches."""
        return replace(self, patches=self.patches + patches)

    def layer_names(self) -> dict[str, str]:
        """Every name that LoRA files use for a layer -> its name in the module; norms and embeddings have ComfyUI's."""
        names = {}
        for key, tower in self.towers.items():
            for name, layer in tower.model.named_modules():
                full = f"text_model.{name.removeprefix('text_model.')}"
                if isinstance(layer, nn.Linear):
                    names |= dict.fromkeys(_spellings(tower, full), f"{key}.model.{name}")
                elif hasattr(layer, "weight"):
                    names[_comfy(tower, full)] = f"{key}.model.{name}"
            if tower.projection is not None:
                names |= dict.fromkeys(_spellings(tower, "text_projection"), f"{key}.projection")
        return names

    @torch.no_grad()
    def encode(self, text: str | Mapping[str, str]) -> list[list[Any]]:
        """CONDITIONING of a prompt, on the CPU; see `encoded`."""
        context, pooled = self.encoded(text)
        return [[context.cpu(), {"pooled_output": pooled.cpu()}]]

    def encoded(self, text: str | Mapping[str, str]) -> tuple[Tensor, Tensor]:
        """Context (1, 77 · chunks, width) and pooled output (1, width) of a prompt, on the encoders' device.

        A token's weight w moves its embedding away from the empty prompt's: empty + w (embedding - empty).
        SDXL: both encoders' contexts side by side, OpenCLIP-bigG's pooled output.

        Args:
            text: the prompt, or one for each encoder by its key.

        Raises:
            HostError: prompts for other encoders than there are.
        """
        texts = dict.fromkeys(self.towers, text) if isinstance(text, str) else self._checked(text)
        parts = {key: prompts.chunks(texts[key], tokenize, tower.kind.pad) for key, tower in self.towers.items()}
        longest = max(len(part) for part in parts.values())
        module, contexts, pooled = self.weights.merged(self.patches), [], None
        for key, tower in module.items():  # type: ignore[operator]
            empty = prompts.empty_chunk(tower.kind.pad)
            part = parts[key] + [empty] * (longest - len(parts[key]))
            context, pooled = _weighted(tower, part, empty)
            contexts.append(context)
        return torch.cat(contexts, dim=-1), pooled

    def _checked(self, texts: Mapping[str, str]) -> Mapping[str, str]:
        if set(texts) != set(self.towers):
            raise HostError(
                f"there are prompts for {len(texts)} text encoders, but this {self.family} checkpoint has"
                f" {len(self.towers)}; use the node CLIPTextEncode, or choose an SDXL checkpoint"
            )
        return texts


def read_text_encoder(state: Mapping[str, Tensor], family: str, name: str, device: torch.device) -> TextEncoder | None:
    """The checkpoint's text encoder; None if it has none.

    Raises:
        HostError: the encoder is incomplete.
    """
    towers = read_towers(state, family, name)
    return None if towers is None else TextEncoder(Weights(towers.to(device).eval(), rounding=_STORED), family)


def context_width(clip: TextEncoder) -> int:
    """Width of the contexts that it makes."""
    return sum(tower.model.config.hidden_size for tower in clip.towers.values())


def _weighted(tower: Tower, parts: list[prompts.Chunk], empty: prompts.Chunk) -> tuple[Tensor, Tensor]:
    """Context (1, 77 · chunks, width) and the first chunk's pooled output (1, width)."""
    weighted = any(weight != 1.0 for chunk in parts for weight in chunk.weights)
    ids = [chunk.ids for chunk in ([*parts, empty] if weighted else parts)]
    context, pooled = tower(to_device(torch.tensor(ids), next(tower.parameters()).device))
    if weighted:
        factor = to_device(torch.tensor([chunk.weights for chunk in parts]), context.device)[..., None]
        context, nothing = context[:-1], context[-1]
        context = torch.where(factor == 1.0, context, (context - nothing) * factor + nothing)
    return context.flatten(0, 1)[None], pooled[:1]


def _spellings(tower: Tower, full: str) -> tuple[str, ...]:
    kohya, diffusers = tower.kind.lora
    flat = full.replace(".", "_")
    return (*(f"{start}_{flat}" for start in kohya), f"{diffusers}.{full}", _comfy(tower, full))


def _comfy(tower: Tower, full: str) -> str:
    return f"text_encoders.clip_{tower.kind.key}.transformer.{full}"
