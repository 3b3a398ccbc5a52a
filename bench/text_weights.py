"""Text encoders of seeded random weights, in the key names of single-file checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY = 49408
POSITIONS = 77
MARKS = 2  # the last tokens of the vocabulary: start and end of text
_MARK_SCALE = 0.02
_ATTENTION_GAIN = 3.0


def clip_l(seed: int, layers: int = 12) -> dict[str, Tensor]:
    """Random weights of CLIP-L's text encoder, float16, "transformer.text_model.…" as in SD1 checkpoints.

    transformers' initialisation, but with small start and end marks and positions and with louder attention: so the
    padding (which is end marks) carries the words before it, as in the trained CLIP. Captions that differ in one word
    are 0.3 apart over all 77 tokens (unrelated embeddings: 1); with the plain initialisation it would be 0.1.
    """
    random = torch.Generator().manual_seed(seed)
    tokens, positions = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    weights = _ends(random, 768, tokens, positions, "final_layer_norm")
    for layer in range(layers):
        name = f"encoder.layers.{layer}."
        for part in ("q", "k", "v"):
            weights |= _linear(random, f"{name}self_attn.{part}_proj", 768, 768, 768**-0.5 * (2 * layers) ** -0.5)
        weights |= _linear(random, f"{name}self_attn.out_proj", 768, 768, _ATTENTION_GAIN * 768**-0.5)
        weights |= _norm(f"{name}layer_norm1", 768) | _norm(f"{name}layer_norm2", 768)
        weights |= _linear(random, f"{name}mlp.fc1", 768, 3072, (2 * 768) ** -0.5)
        weights |= _linear(random, f"{name}mlp.fc2", 3072, 768, 768**-0.5 * (2 * layers) ** -0.5)
    return {"transformer.text_model." + key: value.half() for key, value in weights.items()}


def open_clip_h(seed: int, layers: int = 24) -> dict[str, Tensor]:
    """Random weights of OpenCLIP-H's text encoder, float16, "model.…" as in SD2 checkpoints (24 layers: 700 MB).

    ComfyUI wants all 24 layers; fewer are for tests of loaders that count them.
    """
    random = torch.Generator().manual_seed(seed)
    weights = _ends(random, 1024, "token_embedding.weight", "positional_embedding", "ln_final")
    weights["text_projection"] = _normal(random, (1024, 1024), 1024**-0.5)
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}."
        attention = _linear(random, "x", 1024, 3 * 1024, 1024**-0.5 * (2 * layers) ** -0.5)
        weights[f"{name}attn.in_proj_weight"], weights[f"{name}attn.in_proj_bias"] = attention.values()
        weights |= _linear(random, f"{name}attn.out_proj", 1024, 1024, _ATTENTION_GAIN * 1024**-0.5)
        weights |= _norm(f"{name}ln_1", 1024) | _norm(f"{name}ln_2", 1024)
        weights |= _linear(random, f"{name}mlp.c_fc", 1024, 4096, (2 * 1024) ** -0.5)
        weights |= _linear(random, f"{name}mlp.c_proj", 4096, 1024, 1024**-0.5 * (2 * layers) ** -0.5)
    return {"model." + key: value.half() for key, value in weights.items()}


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
