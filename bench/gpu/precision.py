"""Losses and gradients in every precision that training has, against float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ...training.adapters import Trained, trainable
from ...training.layers import GROUPS, LoraSettings
from ...training.loop import Loop
from ...training.parallel import Processes
from ...training.settings import OptimizerSettings, TrainSettings
from ..random_backbone import RandomBackbone
from ..tiny_unet import unet_config
from .setting import Setting, emptied, tf32
from .steps import computing, dataset

_WAYS = {
    "fp32": (torch.float32, "fp32"),
    "fp32 weights, autocast bf16": (torch.float32, "bf16"),
    "fp32 weights, autocast fp16": (torch.float32, "fp16"),
    "fp16 weights, autocast bf16": (torch.float16, "bf16"),
    "fp16 weights, autocast fp16": (torch.float16, "fp16"),
    "fp16 weights, precision fp32": (torch.float16, "fp32"),
    "native fp16": (torch.float16, ""),
    "native bf16": (torch.bfloat16, ""),
}
"""The weights' dtype, and the precision of Diff2Flow Optimizer Config; "": everything in the weights' dtype."""
_IN_SMALL = ("fp32 weights, autocast bf16",)
_LORA = LoraSettings(groups=GROUPS, rank=8, alpha=8.0)
_FP16_SCALE = 65536.0
"""What a gradient scaler begins with."""
_BATCH, _BATCHES, _SMALL_SIDE = 2, 3, 64

Measured = tuple[list[float], Tensor]
"""Losses of some batches, and the gradient (N,) of the last one."""


def small(setting: Setting) -> None:
    """A tiny network in every precision against float32 on the CPU."""
    config, home = unet_config(1, 1, width=32), torch.device("cpu")

    def made(dtype: torch.dtype, device: torch.device) -> RandomBackbone:
        backbone = RandomBackbone(config, home, dtype)  # each device would draw weights of its own
        backbone.module.to(device)
        backbone.device = device
        return backbone

    reference = _measured(made(torch.float32, home), _SMALL_SIDE, "fp32")
    _compare(setting, "tiny SD1.5", _SMALL_SIDE, lambda dtype: made(dtype, setting.device), reference)


def full_size(setting: Setting) -> None:
    """SD1.5 and SDXL of full size in every precision against float32 on the same device."""
    for family in ("SDXL",) if setting.small else ("SD1.5", "SDXL"):
        with setting.findings.guarded(f"{family} in float32"), emptied():
            with tf32(False):
                reference = _measured(setting.backbone(family, torch.float32), setting.side(family), "fp32")
            _compare(setting, family, setting.side(family), partial(setting.backbone, family), reference)


def _compare(
    setting: Setting, family: str, side: int, made: Callable[[torch.dtype], RandomBackbone], reference: Measured
) -> None:
    def case(dtype: torch.dtype, precision: str) -> dict[str, float]:
        with emptied(), tf32(False):
            return _difference(_measured(made(dtype), side, precision), reference)

    for name in _IN_SMALL if setting.small else _WAYS:
        about = {"family": family, "side": side, "way": name}
        setting.findings.case(f"{family}, {name}", partial(case, *_WAYS[name]), **about)


def _measured(backbone: RandomBackbone, side: int, precision: str) -> Measured:
    scale = _FP16_SCALE if precision == "fp16" else 1.0
    settings = TrainSettings(1, _BATCH, 1e-4, optimizer=OptimizerSettings(precision=precision or "fp32"))
    place = computing(backbone, precision) if precision else nullcontext()
    with dataset(backbone, side, _BATCH) as data, place, _changed(backbone) as adapters:
        loop, losses = Loop(backbone, data, adapters, settings, Processes()), []
        for step in range(_BATCHES):
            loss = loop.loss(loop.micro_batch(list(range(_BATCH)), step))
            losses.append(loss.item())
        (loss * scale).backward()
        gradients = [parameter.grad for parameter in adapters.parameters() if parameter.grad is not None]
        return losses, torch.cat([each.float().flatten().cpu() / scale for each in gradients])


@contextmanager
def _changed(backbone: RandomBackbone) -> Iterator[Trained]:
    """LoRA layers everywhere that change something: fresh ones leave half of their own gradient 0."""
    draw = torch.Generator().manual_seed(3)
    with trainable(backbone, _LORA, 0) as adapters:
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=draw).to(parameter.device)
        yield adapters


def _difference(found: Measured, true: Measured) -> dict[str, float]:
    losses = zip(found[0], true[0], strict=True)
    gradient, exact = (each[1].double() for each in (found, true))
    cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0)
    return {
        "worst_loss_difference": max(abs(loss - expected) / expected for loss, expected in losses),
        "gradient_cosine": cosine.item(),
        "gradient_error": ((gradient - exact).norm() / exact.norm()).item(),
        "gradient_share_lost_to_0": ((gradient == 0) & (exact != 0)).double().mean().item(),
    }
