"""Whether a dataset is one for the network that is to be trained on it, and for what is to be trained."""

from __future__ import annotations

from .layers import FIRST, LoraSettings
from .objective import ObjectiveSettings
from .port import Backbone, TrainingDataset
from .reflow_settings import ReflowSettings


def require_fit(backbone: Backbone, dataset: TrainingDataset) -> None:
    """Raises ValueError where the dataset's latents or embeddings are not those of the bare network."""
    for path, name in backbone.layer_names().items():
        layer = backbone.module.get_submodule(path)
        fitting = {dataset.latent_channels, inputs_of(dataset) or dataset.latent_channels}
        if FIRST.fullmatch(name) and layer.weight.shape[1] not in fitting:
            raise ValueError(
                f"model: its network takes {layer.weight.shape[1]} input channels, the dataset's latents have"
                f" {dataset.latent_channels} (inpainting and depth models have more); choose a plain checkpoint"
            )
        if name.endswith(".attn2.to_k") and layer.weight.shape[1] != dataset.context_width:
            raise ValueError(
                f"dataset: its text embeddings are {dataset.context_width} wide, the model takes"
                f" {layer.weight.shape[1]}; make the dataset with the CLIP of the checkpoint that is trained"
            )


def inputs_of(dataset: TrainingDataset) -> int:
    """Channels that the network must take for a dataset with images to look at; 0 where it has none."""
    return dataset.latent_channels + dataset.image_channels if dataset.image_channels else 0


def require_suited(objective: ObjectiveSettings, dataset: TrainingDataset, lora: LoraSettings) -> None:
    """Raises ValueError where reflow asks for pairs and there are none, or for a teacher that is not kept.

    And where the network is to look at images and its first layer is not trained, or noise that the data brings is to
    be paired with it anew.
    """
    reflow = objective.reflow
    if objective.transports and dataset.has_noise:
        raise ValueError(
            f"loss: pairing '{objective.pairing}' cannot be combined with '{dataset.name}', whose pairs have their own"
            " noise; choose pairing 'independent' in Diff2Flow Loss Config, or train on images"
        )
    if dataset.image_channels:
        _require_depth(reflow, dataset, lora)
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


def _require_depth(reflow: ReflowSettings, dataset: TrainingDataset, lora: LoraSettings) -> None:
    if lora.full or not lora.ends_in_full:
        what = "preset 'full'" if lora.full else f"preset '{lora.preset}' without ends_in_full"
        raise ValueError(
            f"lora: '{dataset.name}' holds depth, for which the first layer takes the image, too, and is trained in"
            f" full beside LoRA layers; {what} does not do that: choose preset 'paper-small' or 'paper-base', or"
            " 'custom' with ends_in_full on"
        )
    if reflow.windows:
        raise ValueError(
            f"loss: recipe 'windows' asks the untrained network, which knows nothing of depth; remove it to train on"
            f" '{dataset.name}'"
        )
