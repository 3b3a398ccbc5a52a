"""Whether a dataset is one for the network that is to be trained on it."""

from __future__ import annotations

from .layers import FIRST
from .port import Backbone, TrainingDataset


def require_fit(backbone: Backbone, dataset: TrainingDataset) -> None:
    """Raises ValueError where the dataset's latents or embeddings are not those of the bare network."""
    for path, name in backbone.layer_names().items():
        layer = backbone.module.get_submodule(path)
        if FIRST.fullmatch(name) and layer.weight.shape[1] != dataset.latent_channels:
            raise ValueError(
                f"model: its network takes {layer.weight.shape[1]} input channels, the dataset's latents have"
                f" {dataset.latent_channels} (inpainting and depth models have more); choose a plain checkpoint"
            )
        if name.endswith(".attn2.to_k") and layer.weight.shape[1] != dataset.context_width:
            raise ValueError(
                f"dataset: its text embeddings are {dataset.context_width} wide, the model takes"
                f" {layer.weight.shape[1]}; make the dataset with the CLIP of the checkpoint that is trained"
            )
