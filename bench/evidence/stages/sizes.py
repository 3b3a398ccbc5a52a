"""How many parameters the presets train on full-size networks, against what the paper's tables say."""

from __future__ import annotations

import torch

from ....training.layers import PRESETS, choose_layers
from ...full_unets import UNETS
from ..section import Claim, Section, Table
from ..stage import Context, Result, Stage, number

PAPER = {"paper-small": 62e6, "paper-base": 222e6}
"""What the paper's Table 4 calls them."""
_ALLOWED = 0.1
_LORAS = tuple(name for name, settings in PRESETS.items() if not settings.full)
_NETWORKS = ("SD1.5", "SD2.1")


def run(context: Context) -> Result:
    """Counts on networks without memory for their weights."""
    from diffusers import UNet2DConditionModel

    found, weights = {}, {}
    for name in _NETWORKS:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**UNETS[name])
        layers = {path: path for path, module in unet.named_modules() if hasattr(module, "weight")}
        weights[name] = sum(parameter.numel() for parameter in unet.parameters())
        for preset in _LORAS:
            found[f"{name}, {preset}"] = sum(layer.size for layer in choose_layers(unet, layers, PRESETS[preset]))
    numbers = {name: number(size, "") for name, size in found.items()}
    return {"trained": found, "weights": weights, "numbers": numbers}


def render(result: Result) -> Section:
    """Presets by network, beside the paper's numbers."""
    networks, rows = list(result["weights"]), []
    for preset in _LORAS:
        sizes = [f"{result['trained'][f'{name}, {preset}'] / 1e6:.1f} M" for name in networks]
        rows.append((preset, *sizes, f"{PAPER[preset] / 1e6:.0f} M" if preset in PAPER else "-"))
    claims = []
    for preset, wanted in PAPER.items():
        size = result["trained"][f"SD2.1, {preset}"]
        text = f"parameters that preset {preset} trains on SD2.1"
        goal = f"{wanted / 1e6:.0f} M in the paper, ± {_ALLOWED:.0%}"
        claims.append(Claim(text, f"{size / 1e6:.1f} M", goal, abs(size / wanted - 1) <= _ALLOWED))
    weights = ("all weights", *(f"{result['weights'][name] / 1e6:.0f} M" for name in networks), "-")
    return Section(claims, (Table("Trained parameters", ("preset", *networks, "paper"), [*rows, weights]),))


STAGE = Stage("sizes", "Trained parameters of the presets", 3, (0.2, 0.2), run, render)
