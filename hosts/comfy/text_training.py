"""ComfyUI's CLIP made ready for gradients: the port's TextBackbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...training.contexts import padded
from ..port import HostError
from .identity import ENCODERS


class ComfyText:
    """The port's TextBackbone (`training.port`) around a CLIP.

    Args:
        clip: tells tokenizer and layer (CLIP Set Last Layer).
        patcher: clone of its ModelPatcher, which holds the weights.

    Raises:
        HostError: the text encoder is none of Stable Diffusion's.
    """

    def __init__(self, clip: Any, patcher: Any) -> None:
        self.patcher, self._clip, self._model = patcher, clip, patcher.model
        encoders = [getattr(self._model, name).transformer for name in ENCODERS if hasattr(self._model, name)]
        if not encoders:
            raise HostError(
                f"clip: a {type(self._model).__name__} is no text encoder of Stable Diffusion 1.x, 2.x or SDXL; connect"
                " the CLIP of the checkpoint that is trained, or switch text_encoder off"
            )
        prefixes = ("lora_te",) if len(encoders) == 1 else ("lora_te1", "lora_te2")
        self.modules: Mapping[str, nn.Module] = dict(zip(prefixes, encoders, strict=True))

    def layer_names(self, prefix: str) -> Mapping[str, str]:
        """The modules' own names."""
        return {name: name for name, module in self.modules[prefix].named_modules() if hasattr(module, "weight")}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """As CLIPTextEncode encodes, with gradients; a caption that occurs twice is encoded once."""
        encoded = {caption: self._encode(caption) for caption in dict.fromkeys(captions)}
        contexts = [encoded[caption][0] for caption in captions]
        pooled = [encoded[caption][1] for caption in captions]
        context = padded(contexts, lambda: (encoded.get("") or self._encode(""))[0])
        return context, None if pooled[0] is None else torch.cat(pooled)

    def _encode(self, caption: str) -> tuple[Tensor, Tensor | None]:
        """What `comfy.sd.CLIP.encode_from_tokens` does, without loading anew."""
        self._model.reset_clip_options()
        if self._clip.layer_idx is not None:
            self._model.set_clip_options({"layer": self._clip.layer_idx})
        self._model.set_clip_options({"execution_device": self.patcher.load_device})
        context, pooled = self._model.encode_token_weights(self._clip.tokenize(caption))[:2]
        return context, pooled

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """ComfyUI adds each block's output to its input in place, which would spoil what a norm keeps for backward:
        meanwhile norms get a copy."""
        norms = [m for module in self.modules.values() for m in module.modules() if isinstance(m, nn.LayerNorm)]
        hooks = [norm.register_forward_pre_hook(_copied) for norm in norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _copied(norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].clone(), *inputs[1:])
