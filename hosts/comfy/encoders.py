"""Text and images through ComfyUI's encoders.

Whatever lets ComfyUI load a model runs under inference mode here, as it does in ComfyUI's own nodes: weights that were
made under inference mode and are moved without it cannot be viewed or multiplied any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.sd1_clip import load_embed
from torch import Tensor

from ...training.shards import content_digest


@torch.inference_mode()
def encode_text(clip: Any, text: str) -> Any:
    """CONDITIONING of a prompt, as CLIPTextEncode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def inversions(clip: Any, names: Sequence[str]) -> dict[str, str]:
    """Digests of the textual inversions that there are by these names, as the CLIP's tokenizers find them."""
    tokenizers = [each for each in vars(clip.tokenizer).values() if getattr(each, "embedding_directory", None)]
    found = {}
    for name in names:
        loaded = [load_embed(name, t.embedding_directory, t.embedding_size, t.embedding_key) for t in tokenizers]
        tensors = [(str(i), tensor.detach()) for i, tensor in enumerate(loaded) if tensor is not None]
        if tensors:
            found[name] = content_digest(tensors)[:16]
    return found


@torch.inference_mode()
def encode_image(vae: Any, image: Tensor) -> Tensor:
    """Latents of an IMAGE, as VAEEncode makes them."""
    return vae.encode(image[:, :, :, :3])


@torch.inference_mode()
def decode_image(vae: Any, latent: Tensor) -> Tensor:
    """IMAGE of latents, as VAEDecode makes it."""
    image = vae.decode(latent)
    return image.reshape(-1, *image.shape[-3:])
