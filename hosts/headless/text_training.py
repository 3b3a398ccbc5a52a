"""Text encoders made ready for gradients: the port's TextBackbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...training.contexts import padded
from .text import TextEncoder
from .weights import Weights


class HeadlessText:
    """The port's TextBackbone (`training.port`) around a twin of the encoders with their patches merged in.

    Args:
        clip: of any family; it cannot be changed by training.
    """

    def __init__(self, clip: TextEncoder) -> None:
        module = clip.weights.trainable(clip.patches)
        self._encoder = replace(clip, weights=Weights(module), patches=())
        self._names = _names_by_prefix(clip)
        self.modules: Mapping[str, nn.Module] = {
            prefix: module.get_submodule(_tower(names, len(self._names))) for prefix, names in self._names.items()
        }

    def layer_names(self, prefix: str) -> Mapping[str, str]:
        names = self._names[prefix]
        outer = _tower(names, len(self._names))
        return {path.removeprefix(f"{outer}.") if outer else path: name for path, name in names.items()}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """As `TextEncoder.encoded`; a caption that occurs twice is encoded once."""
        encoded = {caption: self._encoder.encoded(caption) for caption in dict.fromkeys(captions)}
        contexts, pooled = zip(*(encoded[caption] for caption in captions), strict=True)
        context = padded(contexts, lambda: (encoded.get("") or self._encoder.encoded(""))[0])
        return context, torch.cat(pooled)


def _names_by_prefix(clip: TextEncoder) -> dict[str, dict[str, str]]:
    """Prefix of keys in LoRA files -> path in the encoders' module -> dotted name, read off diffusers' spelling."""
    first = "lora_te1" if clip.family == "SDXL" else "lora_te"
    prefixes = {"text_encoder": first, "text_encoder_2": "lora_te2"}
    found: dict[str, dict[str, str]] = {}
    for spelling, path in clip.layer_names().items():
        owner, _, name = spelling.partition(".")
        if owner in prefixes:
            found.setdefault(prefixes[owner], {})[path] = name
    return found


def _tower(names: Mapping[str, str], encoders: int) -> str:
    """Path of one of several encoders in the module that holds them; "" where there is one."""
    return next(iter(names)).partition(".")[0] if encoders > 1 else ""
