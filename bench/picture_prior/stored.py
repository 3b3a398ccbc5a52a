"""The prior as it is kept: narrow float16 weights in one file of a few megabytes, with where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files import written_whole
from . import autoencoder
from .network import Network

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

COMMITTED = Path(__file__).parent / "prior.safetensors"
"""In the repository."""
LARGEST = 12_000_000
"""Bytes that it may have there."""
_KEY = "diff2flow.picture_prior"


@dataclass(frozen=True)
class Prior:
    """Everything a checkpoint is written from.

    Args:
        network: UNet and words, averaged weights.
        autoencoder: as narrow as it was trained.
        mean, std: of the encoder's outputs; x_data = (z - mean)/std.
        provenance: how it was trained: "step", "pictures", "seconds", "command", "packages" and so on.
    """

    network: Network
    autoencoder: AutoencoderTiny
    mean: float
    std: float
    provenance: Mapping[str, Any]


def path_in(work: Path) -> Path:
    """Where training puts it."""
    return work / "prior.safetensors"


def newest(work: Path) -> Path:
    """The work folder's file, or else the repository's.

    Raises:
        RuntimeError: there is none.
    """
    for path in (path_in(work), COMMITTED):
        if path.is_file():
            return path
    raise RuntimeError(
        f"there is no trained prior in {work}: run 'python -m diff2flow_nodes.bench.picture_prior train'"
    )


def write(path: Path, prior: Prior) -> None:
    """Writes the file, whole or not at all."""
    from safetensors.torch import save_file

    parts = {"network": prior.network.state_dict(), "autoencoder": prior.autoencoder.state_dict()}
    state = {f"{part}.{key}": _narrow(value) for part, values in parts.items() for key, value in values.items()}
    about = {"mean": prior.mean, "std": prior.std, **prior.provenance}
    with written_whole(path) as temporary:
        save_file(state, str(temporary), metadata={_KEY: json.dumps(about)})


def read(path: Path) -> Prior:
    """Reads what `write` wrote; float32."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        about = json.loads((file.metadata() or {})[_KEY])
        state = {key: _wide(file.get_tensor(key)) for key in list(file.keys())}
    network = Network(state["network.words.tokens"].tolist())
    network.load_state_dict(_part(state, "network."))
    module = autoencoder.autoencoder(autoencoder.WIDTH)
    module.load_state_dict(_part(state, "autoencoder."))
    mean, std = about.pop("mean"), about.pop("std")
    return Prior(network.requires_grad_(False).eval(), module, mean, std, about)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _narrow(value: Tensor) -> Tensor:
    """float16; token ids as 32-bit integers."""
    return value.detach().cpu().to(torch.float16 if value.is_floating_point() else torch.int32).contiguous()


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value.long()
