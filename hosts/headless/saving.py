"""A MODEL, CLIP and VAE as the tensors of one checkpoint file: those of their own files, but for what LoRAs change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...training.checkpoint_file import SNR_MARK, V_MARK, StoredTensor, stored_tensors
from ..port import HostError
from .autoencoder import PREFIX as VAE_PREFIX
from .autoencoder import Autoencoder
from .checkpoint import read_weights
from .model import Model
from .text import TextEncoder
from .towers import Kind
from .unet_layout import PREFIX
from .weights import Patch

MARKERS = (V_MARK, SNR_MARK, f"{PREFIX}{V_MARK}", f"{PREFIX}{SNR_MARK}")
"""Keys without values that say how a network predicts."""
_TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
_AVERAGE = "model_ema."
"""A second UNet in some files, which nothing samples with."""
_IN_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
"""transformers' layers of a text encoder's block, and OpenCLIP's names of them."""
_OUTSIDE_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
"""transformers' weights outside the blocks, and OpenCLIP's names of them."""
_TOGETHER = ("q_proj", "k_proj", "v_proj")
"""transformers' layers that are one in OpenCLIP, in its order."""


def checkpoint_tensors(model: Model, clip: TextEncoder, vae: Autoencoder) -> dict[str, StoredTensor]:
    """The three files' own tensors by key, without markers; patched weights are merged.

    Raises:
        HostError: clip or vae did not come from a checkpoint, or of another family.
    """
    if clip.family != model.base.layout.family:
        raise HostError(
            f"clip: a text encoder of {clip.family} cannot go into a checkpoint of {model.base.layout.family}; connect"
            " the CLIP of the same checkpoint"
        )
    elsewhere = (*_TEXT_PREFIXES, VAE_PREFIX, _AVERAGE)
    own = _file(model.base.path, "model")
    text, pixels = _file(clip.path, "clip"), _file(vae.path, "vae")
    return {
        **{key: tensor for key, tensor in own.items() if not key.startswith(elsewhere) and key not in MARKERS},
        **{key: tensor for key, tensor in text.items() if key.startswith(_TEXT_PREFIXES)},
        **{key: tensor for key, tensor in pixels.items() if key.startswith(VAE_PREFIX)},
        **_in_place(own, _merged_unet(model)),
        **_in_place(text, _merged_text(clip, text)),
    }


def _file(path: Path | None, name: str) -> dict[str, StoredTensor]:
    if path is None:
        raise HostError(f"{name}: it did not come from a checkpoint file; connect that of a checkpoint loader")
    if path.suffix.lower() == ".safetensors":
        return stored_tensors(path)
    return {key: StoredTensor.of(tensor) for key, tensor in read_weights(path, path.name).items()}


def _in_place(file: Mapping[str, StoredTensor], merged: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """The merged tensors in the shapes that the file has them in: a 1×1 convolution may be a linear layer there."""
    return {key: StoredTensor(file[key].shape, tensor.dtype, lambda t=tensor: t) for key, tensor in merged.items()}


def _targets(patches: Iterable[Patch]) -> set[str]:
    return {patch.target for patch in patches if patch.strength}


def _merged_unet(model: Model) -> dict[str, Tensor]:
    """Patched weights by their keys in the file."""
    weights = dict(model.base.weights.merged(model.patches).named_parameters())
    ldm = {module: name for name, module in model.base.ldm_names.items()}
    merged = {}
    for target in _targets(model.patches):
        module, _, ending = target.rpartition(".")
        merged[f"{PREFIX}{ldm[module]}.{ending}"] = weights[target]
    return merged


def _merged_text(clip: TextEncoder, file: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Patched weights of the text encoders by their keys in the file."""
    weights = dict(clip.weights.merged(clip.patches).named_parameters())
    merged = {}
    for target in _targets(clip.patches):
        tower, _, name = target.partition(".")
        kind = clip.towers[tower].kind
        merged |= (_open_clip if kind.open_clip else _transformers)(kind, name, weights, file)
    return merged


def _transformers(
    kind: Kind, name: str, weights: Mapping[str, Tensor], file: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """One weight under transformers' name; older files lack "text_model."."""
    inner = name.removeprefix("model.").removeprefix("text_model.")
    spellings = (f"{prefix}{outer}{inner}" for prefix in kind.prefixes for outer in ("text_model.", ""))
    return {next(key for key in spellings if key in file): weights[f"{kind.key}.{name}"]}


def _open_clip(
    kind: Kind, name: str, weights: Mapping[str, Tensor], file: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """One weight under OpenCLIP's name; queries, keys and values are one tensor there, the projection is turned."""
    prefix = next(prefix for prefix in kind.prefixes if f"{prefix}token_embedding.weight" in file)
    if name == "projection.weight":
        turned, plain = f"{prefix}text_projection", f"{prefix}text_projection.weight"
        weight = weights[f"{kind.key}.{name}"]
        return {turned: weight.T} if turned in file else {plain: weight}
    before, _, after = name.partition("encoder.layers.")
    if not after:
        inner = name.removeprefix("model.").removeprefix("text_model.")
        return {prefix + _OUTSIDE_OPEN_CLIP[inner]: weights[f"{kind.key}.{name}"]}
    number, _, rest = after.partition(".")
    layer, _, ending = rest.rpartition(".")
    block = f"{prefix}transformer.resblocks.{number}."
    if layer.removeprefix("self_attn.") in _TOGETHER:
        start = f"{kind.key}.{before}encoder.layers.{number}.self_attn."
        parts = [weights[f"{start}{part}.{ending}"] for part in _TOGETHER]
        return {f"{block}attn.in_proj_{ending}": torch.cat(parts)}
    return {f"{block}{_IN_OPEN_CLIP[layer]}.{ending}": weights[f"{kind.key}.{name}"]}
