"""One training step, three ways, on the same network and data inside ComfyUI: bare, ours, and core's TrainLoraNode.

Importing this module starts ComfyUI (see `comfy_process`).
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import time
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
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from diff2flow_nodes.hosts import current  # noqa: E402
from diff2flow_nodes.training.adapters import trainable  # noqa: E402
from diff2flow_nodes.training.dataset import Item, LatentDataset, context_key  # noqa: E402
from diff2flow_nodes.training.finetune import Job, Keeping, finetune  # noqa: E402
from diff2flow_nodes.training.layers import GROUPS, LoraSettings  # noqa: E402
from diff2flow_nodes.training.product import Output  # noqa: E402
from diff2flow_nodes.training.settings import TrainSettings  # noqa: E402
from diff2flow_nodes.training.shards import ShardStore  # noqa: E402

BATCH, ITEMS, RANK, RATE = 4, 16, 8, 1e-4
LORA = LoraSettings(groups=GROUPS, rank=RANK, alpha=float(RANK))
EQUAL = {"training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False}
DEFAULTS = {"training_dtype": "bf16", "lora_dtype": "bf16", "gradient_checkpointing": True}
"""TrainLoraNode as the other two ways train, and as its own widgets are set."""
_NODE = {
    "batch_size": BATCH, "grad_accumulation_steps": 1, "learning_rate": RATE, "rank": RANK, "optimizer": "AdamW",
    "loss_function": "MSE", "seed": 0, "quantized_backward": False, "algorithm": "LoRA", "checkpoint_depth": 1,
    "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
}  # fmt: skip


class StepClock:
    """While the context lasts, takes the time whenever any optimizer has made a step: what repeats in a training, and
    nothing of how it begins and ends. On the CPU it counts CPU seconds, on CUDA the device's own time."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def __enter__(self) -> StepClock:
        self._hook = register_optimizer_step_post_hook(lambda *_: self._marks.append(_mark()))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def seconds(self) -> float:
        """Mean from one step to the next."""
        first, last = self._marks[0], self._marks[-1]
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        taken = first.elapsed_time(last) / 1000 if DEVICE == "cuda" else last - first
        return taken / (len(self._marks) - 1)


def _mark() -> Any:
    if DEVICE != "cuda":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class Material:
    """What is trained on what.

    Args:
        checkpoint: file.
        model, clip: from it.
        contexts: CONDITIONING of each item's caption, all different.
        latents: (ITEMS, 4, side, side) in the autoencoder's scale.
    """

    checkpoint: Path
    model: Any
    clip: Any
    contexts: list[Any]
    latents: torch.Tensor

    @classmethod
    def of(cls, checkpoint: Path, side: int) -> Material:
        """Loads the checkpoint and makes data."""
        model, clip, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
        with torch.no_grad():
            encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(_caption(i))) for i in range(ITEMS)]
        latents = torch.randn(ITEMS, 4, side, side, generator=torch.Generator().manual_seed(1))
        return cls(checkpoint, model, clip, [cond for each in encoded for cond in each], 5.0 * latents)


def bare(material: Material, steps: int) -> None:
    """Forward, backward and AdamW on one fixed batch: the least that such a step can be."""
    with current().training(material.model) as backbone, trainable(backbone, LORA, 0) as adapters:
        draw = torch.Generator().manual_seed(2)
        x, target = (torch.randn(material.latents[:BATCH].shape, generator=draw).to(backbone.device) for _ in "12")
        tau = 999.0 * torch.rand(BATCH, generator=draw).to(backbone.device)
        context = torch.cat([cond[0] for cond in material.contexts[:BATCH]]).clone().to(backbone.device)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=RATE, fused=True)
        cast = torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")  # as ours does
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with cast:
                output = backbone.module(x, tau, context=context, transformer_options={})
                loss = torch.nn.functional.mse_loss(output.float(), target)
            loss.backward()
            optimizer.step()
            del output, loss  # with their graph, which would live on beside the next one


def ours(material: Material, steps: int, memory_check: bool = True) -> None:
    """The whole run of Diff2Flow Train, from shards to a LoRA file, with its log and ComfyUI's progress bar."""
    host = current()
    with tempfile.TemporaryDirectory() as name, host.training(material.model) as backbone:
        folder = Path(name)
        (folder / "loras").mkdir()
        settings = TrainSettings(steps, BATCH, RATE)
        keeping = Keeping(folder / "runs", memory_check=memory_check)
        job = Job(backbone, _dataset(material, folder), LORA, settings, Output(folder / "loras", "cost"), keeping)
        finetune(job, host.progress(steps, "cost"))


def theirs(material: Material, steps: int, options: Mapping[str, Any]) -> None:
    """The whole run of TrainLoraNode, called as ComfyUI calls it in either API."""
    values = {**_NODE, **options, "model": material.model, "latents": {"samples": material.latents}, "steps": steps}
    values["positive"] = material.contexts
    if hasattr(TrainLoraNode, "define_schema"):
        wanted = inspect.signature(TrainLoraNode.execute).parameters
        TrainLoraNode.execute(**{name: [value] for name, value in values.items() if name in wanted})
    else:
        wanted = inspect.signature(TrainLoraNode.train).parameters
        TrainLoraNode().train(**{name: value for name, value in values.items() if name in wanted})


def has_bypass() -> bool:
    """Whether this ComfyUI's TrainLoraNode can train adapters beside the layers instead of inside their weights."""
    return hasattr(TrainLoraNode, "execute") and "bypass_mode" in inspect.signature(TrainLoraNode.execute).parameters


def _caption(i: int) -> str:
    return f"a drawing of {i} things"


def _dataset(material: Material, folder: Path) -> LatentDataset:
    latents, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    side, items = 8 * material.latents.shape[-1], []
    for i, (latent, cond) in enumerate(zip(material.latents, material.contexts, strict=True)):
        latents.add({f"image{i}": latent[None]})
        texts.add({context_key(_caption(i)): cond[0]})
        items.append(Item(f"{i}.png", _caption(i), f"image{i}", side, side))
    texts.add({context_key(""): material.contexts[0][0]})
    latents.flush()
    texts.flush()
    return LatentDataset("cost", tuple(items), latents, texts)
