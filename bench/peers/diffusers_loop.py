"""diffusers' `examples/text_to_image/train_text_to_image_lora.py`, whole, around stand-ins for what it loads:

    python -m diff2flow_nodes.bench.peers.diffusers_loop FOLDER_OF_THE_SCRIPT

Its autoencoder, text encoder and images are stand-ins that hand out what is known, as the other trainers cache it: what
counts is the loop. It trains the layers that ours does.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from ...training.layers import choose_layers
from ..tiny_unet import random_unet
from .worker import BATCH, CONFIG, LORA, RANK, RATE, SIDE, serve, texts

_SCRIPT = "train_text_to_image_lora.py"


def main() -> None:
    """Serves it."""
    script = loaded(Path(sys.argv[1]) / _SCRIPT)
    unet = random_unet(CONFIG, 0)
    names = {path: path for path, module in unet.named_modules() if hasattr(module, "weight")}
    targets = [layer.path for layer in choose_layers(unet, names, LORA)]

    def way(steps: int) -> None:
        try:
            run(script, unet, targets, steps)
        finally:
            unet.delete_adapters("default")

    serve(way)


def loaded(path: Path) -> ModuleType:
    """The script as a module; `datasets`, of which nothing is used here, need not be installed."""
    if importlib.util.find_spec("datasets") is None:
        sys.modules["datasets"] = MagicMock()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, unet: nn.Module, targets: list[str], steps: int) -> None:
    """Its `main`, so many steps."""
    lora = script.LoraConfig

    def config(**given: Any) -> Any:
        return lora(**{**given, "target_modules": targets})

    stand_ins: dict[str, Any] = {
        "LoraConfig": config,
        "load_dataset": lambda *words, **given: {"train": _Images()},
        "CLIPTokenizer": _loads(lambda: SimpleNamespace(model_max_length=77)),
        "CLIPTextModel": _loads(_Texts),
        "AutoencoderKL": _loads(_Latents),
        "DDPMScheduler": _loads(_schedule),
        "UNet2DConditionModel": _loads(lambda: unet),
    }
    with tempfile.TemporaryDirectory() as folder:
        words = ["--pretrained_model_name_or_path", "none", "--dataset_name", "none", "--output_dir", folder]
        words += ["--rank", RANK, "--learning_rate", RATE, "--train_batch_size", BATCH, "--max_train_steps", steps]
        words += ["--image_column", "image", "--caption_column", "text", "--checkpointing_steps", 10**6, "--seed", "0"]
        with patch.multiple(script, **stand_ins), patch.object(sys, "argv", [_SCRIPT, *map(str, words)]):
            script.main()


def _schedule() -> Any:
    """SD's noise schedule."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def _loads(made: Callable[[], Any]) -> type:
    """A class whose `from_pretrained` makes something."""
    return type("StandIn", (), {"from_pretrained": staticmethod(lambda *words, **given: made())})


class _Images:
    """As many items as are in a batch."""

    column_names = ("image", "text")

    def with_transform(self, transform: Any) -> list[dict[str, Tensor]]:
        return [{"pixel_values": torch.zeros(1), "input_ids": torch.zeros(77, dtype=torch.long)}] * BATCH


class _Texts(nn.Module):
    """Hands out the embeddings."""

    def forward(self, ids: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (texts(),)


class _Latents(nn.Module):
    """Hands out the latents."""

    config = SimpleNamespace(scaling_factor=0.18215)

    def encode(self, pixels: Tensor) -> Any:
        drawn = SimpleNamespace(sample=lambda: 5.0 * torch.randn(BATCH, 4, SIDE, SIDE))
        return SimpleNamespace(latent_dist=drawn)


if __name__ == "__main__":
    main()
