"""One training step, three ways, on the same network and data inside ComfyUI: bare, ours, and core's TrainLoraNode.

Importing this module starts ComfyUI (see `comfy_process`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comfy_process import DEVICE  # noqa: E402  (first: it starts ComfyUI)

# isort: split
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_train import TrainLoraNode  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from diff2flow_nodes.bench import training_steps  # noqa: E402
from diff2flow_nodes.bench.training_steps import BATCH, ITEMS, RANK, RATE  # noqa: E402

EQUAL = {"training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False}
DEFAULTS = {"training_dtype": "bf16", "lora_dtype": "bf16", "gradient_checkpointing": True}
"""TrainLoraNode as the other two ways train, and as its own widgets are set."""
_NODE = {
    "batch_size": BATCH, "grad_accumulation_steps": 1, "learning_rate": RATE, "rank": RANK, "optimizer": "AdamW",
    "loss_function": "MSE", "seed": 0, "quantized_backward": False, "algorithm": "LoRA", "checkpoint_depth": 1,
    "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
}  # fmt: skip


@dataclass(frozen=True)
class Material(training_steps.Material):
    """What is trained on what, and what only ComfyUI's own way needs.

    Args:
        checkpoint: file.
        conditionings: CONDITIONING of each item's caption.
    """

    checkpoint: Path
    conditionings: list[Any]

    @classmethod
    def of(cls, checkpoint: Path, side: int) -> Material:
        """Loads the checkpoint and makes data."""
        model, clip, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
        with torch.no_grad():
            captions = map(training_steps.caption, range(ITEMS))
            encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(caption)) for caption in captions]
        conditionings = [cond for each in encoded for cond in each]
        contexts = [cond[0] for cond in conditionings]
        return cls(model, contexts, training_steps.latents(side), checkpoint, conditionings)


def step_clock() -> training_steps.StepClock:
    """Of the device that ComfyUI was started on."""
    return training_steps.StepClock(DEVICE)


def bare(material: Material, steps: int) -> None:
    """Forward, backward and AdamW on one fixed batch: the least that such a step can be."""
    training_steps.bare(material, _network, steps)


def ours(material: Material, steps: int) -> None:
    """The whole run of Diff2Flow Train."""
    training_steps.ours(material, steps)


def theirs(material: Material, steps: int, options: Mapping[str, Any]) -> None:
    """The whole run of TrainLoraNode, called as ComfyUI calls it in either API."""
    values = {**_NODE, **options, "model": material.model, "latents": {"samples": material.latents}, "steps": steps}
    values["positive"] = material.conditionings
    if hasattr(TrainLoraNode, "define_schema"):
        wanted = inspect.signature(TrainLoraNode.execute).parameters
        TrainLoraNode.execute(**{name: [value] for name, value in values.items() if name in wanted})
    else:
        wanted = inspect.signature(TrainLoraNode.train).parameters
        TrainLoraNode().train(**{name: value for name, value in values.items() if name in wanted})


def has_bypass() -> bool:
    """Whether this ComfyUI's TrainLoraNode can train adapters beside the layers instead of inside their weights."""
    return hasattr(TrainLoraNode, "execute") and "bypass_mode" in inspect.signature(TrainLoraNode.execute).parameters


def _network(module: nn.Module, x: Tensor, tau: Tensor, context: Tensor) -> Tensor:
    return module(x, tau, context=context, transformer_options={})
