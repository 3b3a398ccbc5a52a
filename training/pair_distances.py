"""How far the latent of each reflow pair lies from its noise, and the pairs without the worst of them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint_file import write_tensors
from .pair_dataset import PairDataset
from .port import Backbone, Progress

_LOG = logging.getLogger(__name__)
_BATCH = 64
_DISTANCES = "distances"


def without_worst(dataset: PairDataset, share: float, backbone: Backbone, progress: Progress) -> PairDataset:
    """The pairs without those of greatest distance |x_data - x_noise| (Re-MeanFlow, arXiv 2511.23342).

    Such pairs bend the paths most and say least. Distances are kept beside the pairs and measured once.

    Args:
        dataset: pairs.
        share: of the pairs that is left out, [0, 1); one at least stays.
        backbone: knows the network's scale of latents.
        progress: shows what is going on.
    """
    left_out = min(math.floor(share * len(dataset)), len(dataset) - 1)
    if not left_out:
        return dataset
    distances = pair_distances(dataset, backbone, progress)
    nearest = distances.argsort(stable=True)[: len(dataset) - left_out]
    note = f"{left_out} pairs of greatest distance left out"
    return dataset.chosen(nearest.sort().values, note)


def pair_distances(dataset: PairDataset, backbone: Backbone, progress: Progress) -> Tensor:
    """Root mean square of x_data - x_noise of each pair (N,), float32; what is on disk is not measured again."""
    path = dataset.store.folder / f"distances-{dataset.store.identity_digest[:8]}.safetensors"
    known = _read(path, dataset.store.count)
    missing = dataset.pairs[known[dataset.pairs].isnan()]
    if not len(missing):
        return known[dataset.pairs]
    try:
        for part in missing.split(_BATCH):
            known[part] = _measured(dataset, part.tolist(), backbone)
            progress.update(0, "measuring the distances of pairs")
    finally:
        _write(path, known)
    return known[dataset.pairs]


def _measured(dataset: PairDataset, pairs: list[int], backbone: Backbone) -> Tensor:
    latent = torch.cat([dataset.store.latent(pair) for pair in pairs])
    x_noise = torch.stack([dataset.store.noise_of(pair) for pair in pairs])
    return (backbone.scale_latent(latent).float() - x_noise).square().flatten(1).mean(dim=1).sqrt()


def _read(path: Path, count: int) -> Tensor:
    """Distances by the number of the pair (count,); NaN where it is not known."""
    from safetensors.torch import load_file

    known = torch.full((count,), torch.nan)
    if path.is_file():
        try:
            found = load_file(path)[_DISTANCES][:count]
            if found.ndim != 1 or found.dtype != torch.float32:
                raise ValueError(f"they are {found.dtype} of the shape {tuple(found.shape)}")
            known[: len(found)] = found
        except Exception as error:  # safetensors raises its own type; distances can always be measured again
            _LOG.warning("The distances in %s cannot be read (%s) and are measured again", path, error)
    return known


def _write(path: Path, known: Tensor) -> None:
    try:
        write_tensors(path, {_DISTANCES: known}, {})
    except (OSError, ValueError) as error:
        _LOG.warning("The distances of pairs cannot be kept (%s) and are measured again the next time", error)
