"""How much memory training takes by the pack's own memory check, for networks of full size on a card with bf16.

    python -m diff2flow_nodes.bench.memory_table --family SD1.5 --preset light --batch 1 4

Prints lines of a Markdown table. Nothing is computed and no weight is held: the network is traced as `memory_check` of
Diff2Flow Train does it before the first step, here with the precision that a GPU would choose. It is an estimate, not a
measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import NoiseSchedule
from ..training.adapters import trainable
from ..training.checkpointing import checkpointed
from ..training.layers import PRESETS, LoraSettings
from ..training.memory import Estimate, estimate
from ..training.objective import Objective, ObjectiveSettings
from ..training.settings import OptimizerSettings, TrainSettings
from .full_unets import UNETS
from .random_backbone import POOLED, TOKENS, RandomBackbone

USUAL_SIDE = {"SD1.5": 512, "SD2.1": 768, "SDXL": 1024}
_CHANNELS = 4


@dataclass(frozen=True)
class Case:
    """One run to reckon.

    Args:
        family: of UNETS.
        preset: of `training.layers.PRESETS`.
        side: of the square images, pixels.
        batch: images in a call of the network.
        checkpointing: as in Diff2Flow Optimizer Config.
        precision: "bf16" or "fp16".
        depth: whether the first layer also takes an image.
    """

    family: str
    preset: str
    side: int
    batch: int
    checkpointing: bool = False
    precision: str = "bf16"
    depth: bool = False


class Backbone(RandomBackbone):
    """As much of `training.port.Backbone` as the estimate needs, its network without memory for its weights.

    Args:
        config: arguments of diffusers' UNet2DConditionModel.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, torch.device("meta"), torch.float16)
        self.device = torch.device("cpu")
        self.parameters = sum(parameter.numel() for parameter in self.module.parameters())


def reckoned(case: Case, config: Mapping[str, Any] | None = None) -> Estimate:
    """What the memory check says of a case, with AdamW and without EMA; the frozen original of preset full included.

    Args:
        config: of another network than the family's.
    """
    backbone = Backbone(config or UNETS[case.family])
    options = OptimizerSettings(checkpointing=case.checkpointing, precision=case.precision)
    settings = TrainSettings(1, case.batch, optimizer=options)
    with _trained(backbone, PRESETS[case.preset], case.depth), checkpointed(backbone.module, case.checkpointing):
        backbone.module.to_empty(device="cpu")  # address space that nobody ever writes to
        _normalised_as_on_gpu(backbone.module)
        objective = _objective()
        found = estimate(backbone.module, settings, lambda: _loss(backbone, objective, case))
    if found is None:
        raise ValueError(f"the network cannot be traced: {case}")
    if PRESETS[case.preset].full:
        return Estimate(2 * backbone.parameters, found.trained, found.activations)
    return found


@contextmanager
def _trained(backbone: Backbone, lora: LoraSettings, depth: bool) -> Iterator[None]:
    """The layers to train, in place; preset full trains float32 copies of all weights."""
    if lora.full:
        backbone.module.float().requires_grad_(True)
        backbone.dtype = torch.float32
        yield
        return
    with trainable(backbone, lora, 0, 2 * _CHANNELS if depth else 0):
        yield


def _objective() -> Objective:
    """Of a plain finetuning, its table made before anything is traced."""
    objective = Objective(ObjectiveSettings(), NoiseSchedule.scaled_linear(), "eps")
    objective.alignment.timestep(torch.zeros(1))
    return objective


def _loss(backbone: Backbone, objective: Objective, case: Case) -> Tensor:
    """The loss () of one call, as the training loop has it."""
    size = (case.batch, _CHANNELS, case.side // 8, case.side // 8)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision)
    with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
        given = _conditioning(case, backbone.module.config.cross_attention_dim)
        t = torch.full((case.batch,), 0.5)
        return objective.loss(backbone, torch.zeros(size), torch.zeros(size), t, given).mean()


def _conditioning(case: Case, width: int) -> dict[str, Tensor]:
    given = {"context": torch.zeros(case.batch, TOKENS, width)}
    if case.family == "SDXL":
        given |= {"pooled": torch.zeros(case.batch, POOLED), "sizes": torch.zeros(case.batch, 6)}
    if case.depth:
        given["image"] = torch.zeros(case.batch, _CHANNELS, case.side // 8, case.side // 8)
    return given


def _normalised_as_on_gpu(network: nn.Module) -> None:
    """Normalisations in float32, which autocast chooses on GPUs and not on the CPU."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = _GroupNorm(module)
        elif isinstance(module, nn.LayerNorm):
            module.forward = _LayerNorm(module)


class _Norm:
    def __init__(self, module: Any) -> None:
        self.module = module

    def _parameters(self) -> tuple[Tensor, Tensor]:
        return self.module.weight.float(), self.module.bias.float()


class _GroupNorm(_Norm):
    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x.float(), self.module.num_groups, *self._parameters(), self.module.eps)


class _LayerNorm(_Norm):
    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.float(), self.module.normalized_shape, *self._parameters(), self.module.eps)


def line(case: Case, found: Estimate) -> str:
    """A case as a line of a Markdown table, GiB."""
    parts = (found.frozen, found.trained, found.activations, found.total)
    numbers = " | ".join(f"{part / 2**30:.1f}" for part in parts)
    on = "on" if case.checkpointing else "off"
    return f"| {case.family} | {case.side} | {case.preset} | {case.batch} | {on} | {case.precision} | {numbers} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the lines that are asked for."""
    parser = argparse.ArgumentParser(description="Memory of training, reckoned by the pack's own check.")
    parser.add_argument("--family", choices=list(UNETS), required=True)
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--side", type=int, help="pixels; by default what the family was trained at")
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    given = parser.parse_args(arguments)
    side = given.side or USUAL_SIDE[given.family]
    for checkpointing in {"off": (False,), "on": (True,), "both": (False, True)}[given.checkpointing]:
        for batch in given.batch:
            case = Case(given.family, given.preset, side, batch, checkpointing, given.precision)
            print(line(case, reckoned(case)), flush=True)


if __name__ == "__main__":
    main()
