"""Whether a dataset is one for the network that is to be trained on it, and for what is to be trained."""

from __future__ import annotations

from .layers import FIRST, LoraSettings
from .port import Backbone, TrainingDataset
from .reflow_settings import ReflowSettings


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


def require_suited(reflow: ReflowSettings, dataset: TrainingDataset, lora: LoraSettings) -> None:
    """Raises ValueError where reflow asks for pairs and there are none, or for a teacher that is not kept."""
    if (reflow.drop_worst or reflow.consistency) and not dataset.has_noise:
        raise ValueError(
            f"dataset: '{dataset.name}' holds images, and the recipe is for pairs of noise and latent: connect"
            " Diff2Flow Reflow Pairs, choose recipe 'windows' for images, or remove Diff2Flow Reflow Recipe"
        )
    if reflow.windows and lora.full:
        raise ValueError(
            "lora: recipe 'windows' needs the untrained network as a teacher, which preset 'full' does not keep; choose"
            " a LoRA preset in Diff2Flow LoRA Config, or another recipe"
        )
