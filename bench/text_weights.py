"""Text encoders of seeded random weights, in the key names of single-file checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY = 49408
POSITIONS = 77
MARKS = 2  # the last tokens of the vocabulary: start and end of text
_MARK_SCALE = 0.02
_ATTENTION_GAIN = 3.0


def clip_l(seed: int, layers: int = 12, width: int = 768) -> dict[str, Tensor]:
    """Random weights of CLIP-L's text encoder, float16, "transformer.text_model.…" as in SD1 checkpoints.

    transformers' initialisation, but with small start and end marks and positions and with louder attention: so the
    padding (which is end marks) carries the words before it, as in the trained CLIP. Captions that differ in one word
    are 0.3 apart over all 77 tokens (unrelated embeddings: 1); with the plain initialisation it would be 0.1.
    """
    random = torch.Generator().manual_seed(seed)
    tokens, positions = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    weights = _ends(random, width, tokens, positions, "final_layer_norm")
    for layer in range(layers):
        name = f"encoder.layers.{layer}."
        for part in ("q", "k", "v"):
            weights |= _linear(random, f"{name}self_attn.{part}_proj", width, width, width**-0.5 * (2 * layers) ** -0.5)
        weights |= _linear(random, f"{name}self_attn.out_proj", width, width, _ATTENTION_GAIN * width**-0.5)
        weights |= _norm(f"{name}layer_norm1", width) | _norm(f"{name}layer_norm2", width)
        weights |= _linear(random, f"{name}mlp.fc1", width, 4 * width, (2 * width) ** -0.5)
        weights |= _linear(random, f"{name}mlp.fc2", 4 * width, width, width**-0.5 * (2 * layers) ** -0.5)
    return {"transformer.text_model." + key: value.half() for key, value in weights.items()}


def open_clip_h(seed: int, layers: int = 24) -> dict[str, Tensor]:
    """Random weights of OpenCLIP-H's text encoder, float16, "model.…" as in SD2 checkpoints (24 layers: 700 MB).

    ComfyUI wants all 24 layers; fewer are for tests of loaders that count them.
    """
    return _open_clip(seed, layers, 1024)


def open_clip_g(seed: int, layers: int = 32, width: int = 1280) -> dict[str, Tensor]:
    """Random weights of OpenCLIP-bigG's text encoder, float16, "model.…" as in SDXL checkpoints (32 layers: 1.4 GB).

    ComfyUI wants all 32 layers of width 1280; smaller ones are for tests of loaders that count them.
    """
    return _open_clip(seed, layers, width)


def _open_clip(seed: int, layers: int, width: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    quiet = width**-0.5 * (2 * layers) ** -0.5
    weights = _ends(random, width, "token_embedding.weight", "positional_embedding", "ln_final")
    weights["text_projection"] = _normal(random, (width, width), width**-0.5)
    weights = {key: value.half() for key, value in weights.items()}
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}."
        attention = _linear(random, "x", width, 3 * width, quiet)
        block = dict(zip((f"{name}attn.in_proj_weight", f"{name}attn.in_proj_bias"), attention.values(), strict=True))
        block |= _linear(random, f"{name}attn.out_proj", width, width, _ATTENTION_GAIN * width**-0.5)
        block |= _norm(f"{name}ln_1", width) | _norm(f"{name}ln_2", width)
        block |= _linear(random, f"{name}mlp.c_fc", width, 4 * width, (2 * width) ** -0.5)
        block |= _linear(random, f"{name}mlp.c_proj", 4 * width, width, quiet)
        weights |= {key: value.half() for key, value in block.items()}
    return {"model." + key: value for key, value in weights.items()}


def sdxl(seed: int, layers: tuple[int, int] = (12, 32), widths: tuple[int, int] = (768, 1280)) -> dict[str, Tensor]:
    """CLIP-L as 0 and OpenCLIP-bigG as 1, as in SDXL checkpoints."""
    encoders = clip_l(seed, layers[0], widths[0]), open_clip_g(seed, layers[1], widths[1])
    return {f"{i}.{key}": value for i, encoder in enumerate(encoders) for key, value in encoder.items()}


def _ends(random: torch.Generator, width: int, tokens: str, positions: str, norm: str) -> dict[str, Tensor]:
    embedding = _normal(random, (VOCABULARY, width), 0.02)
    embedding[-MARKS:] *= _MARK_SCALE
    return {tokens: embedding, positions: _normal(random, (POSITIONS, width), 0.02 * _MARK_SCALE)} | _norm(norm, width)


def _linear(random: torch.Generator, name: str, inputs: int, outputs: int, std: float) -> dict[str, Tensor]:
    return {f"{name}.weight": _normal(random, (outputs, inputs), std), f"{name}.bias": torch.zeros(outputs)}


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _normal(random: torch.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=random)
