"""Checks of what ComfyUI's own model patches do to Diff2Flow Sampler, and its own samplers to Diff2Flow Model.

Run as `inside_comfy.py` is. Every node that takes a MODEL and gives one is looked up in the ComfyUI at hand; with
`--write FOLDER` the numbers are kept there for the tables of docs/compatibility.md.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inside_comfy import conditioning, difference, kohya_lora, main, network, run_node

# isort: split
import comfy.hooks
import comfy.samplers
import folder_paths
import torch

import nodes as stock

CFG, STEPS, SEED = 4.0, 8, 7
BAR = 1e-2
SEEN = 1e-4
"""A relative difference above it is an effect."""
GIVEN = ("MODEL", "CONDITIONING", "LATENT_OPERATION", "LATENT")
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
SETTINGS: dict[str, dict[str, Any]] = {
    "PatchModelAddDownscale": {"block_number": 1, "end_percent": 0.5},
    "CFGOverride": {"cfg": 1.0, "end_percent": 0.5},
    "SkipLayerGuidanceDiTSimple": {"start_percent": 0.1, "end_percent": 0.6},
    "HyperTile": {"tile_size": 64},
    "UNetSelfAttentionMultiply": {"q": 1.5},
    "UNetCrossAttentionMultiply": {"q": 1.5},
    "Epsilon Scaling": {"scaling_factor": 1.02},
}
"""Values under which a small network on a small latent shows an effect; the others are the node's defaults."""
LEFT_OUT = {
    "TorchCompileModel": "compiles the network",
    "ModelSampling": "says what sigma is: refused or followed, not a patch beside the sampling",
    "ModelMerge": "merges weights",
    "ModelSubtract": "merges weights",
    "Diff2Flow": "ours",
}
"""Nodes by the beginning of their names."""


def load_extras() -> None:
    """ComfyUI's own nodes beyond nodes.py, as it loads them at its start."""
    if "FreeU" not in stock.NODE_CLASS_MAPPINGS:
        asyncio.run(stock.init_builtin_extra_nodes())


def inputs_of(cls: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Input name to type and options."""
    given = cls.INPUT_TYPES()
    return {
        name: (what[0], what[1] if len(what) > 1 else {})
        for part in ("required", "optional")
        for name, what in (given.get(part) or {}).items()
    }


def patch_nodes() -> dict[str, Any]:
    """Node name to class: what takes one MODEL and gives one."""
    found = {}
    for name, cls in sorted(stock.NODE_CLASS_MAPPINGS.items()):
        if any(name.startswith(beginning) for beginning in LEFT_OUT):
            continue
        if "MODEL" in cls.RETURN_TYPES and any(kind == "MODEL" for kind, _ in inputs_of(cls).values()):
            found[name] = cls
    return found


def arguments_of(name: str, cls: Any, model: Any) -> dict[str, Any]:
    """Inputs of a node by name; LookupError where something is wanted that only other models have, or a file."""
    made = {
        "MODEL": model,
        "CONDITIONING": conditioning(seed=3),
        "LATENT": {"samples": torch.zeros(1, 4, 16, 16)},
    }
    values: dict[str, Any] = {}
    required = cls.INPUT_TYPES().get("required", {})
    for key, (kind, options) in inputs_of(cls).items():
        if key in SETTINGS.get(name, {}):
            values[key] = SETTINGS[name][key]
        elif not isinstance(kind, list) and kind in made:
            values[key] = made[kind]
        elif kind == "LATENT_OPERATION":
            values[key] = call("LatentOperationTonemapReynolds", multiplier=0.5)
        elif isinstance(kind, list) or kind in WIDGETS:
            choices = kind if isinstance(kind, list) else options.get("options", [None])
            if not choices:
                raise LookupError(f"a file of {key}")
            values[key] = options.get("default", choices[0])
        elif key in required:
            raise LookupError(str(kind))
    return values


def call(name: str, **values: Any) -> Any:
    """First output of a stock node, its random numbers fixed."""
    cls = stock.NODE_CLASS_MAPPINGS[name]
    if hasattr(cls, "define_schema"):
        return cls.execute(**values).result[0]
    return getattr(cls(), cls.FUNCTION)(**values)[0]


def latents() -> dict[str, Any]:
    return {"samples": torch.zeros(1, 4, 16, 16)}


def masked() -> dict[str, Any]:
    """An image and a mask that grows from left to right, as DifferentialDiffusion wants it."""
    image = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    return {"samples": image, "noise_mask": torch.linspace(0, 1, 128).expand(1, 1, 128, 128)}


def ours(model: Any, positive: Any, negative: Any, latent: Any) -> torch.Tensor:
    """Diff2Flow Sampler."""
    torch.manual_seed(0)
    inputs = (model, positive, negative, latent, SEED, STEPS, CFG, "euler", 1.0, "auto")
    return run_node("Diff2FlowSampler", *inputs)[0]["samples"]


def theirs(model: Any, positive: Any, negative: Any, latent: Any) -> torch.Tensor:
    """SamplerCustom with the stock euler on the same grid; the model is as it was loaded but for the patch."""
    torch.manual_seed(0)
    sigmas = run_node("Diff2FlowSigmas", network(), STEPS, "uniform", 1.0)[0]
    euler = comfy.samplers.sampler_object("euler")
    return run_node("SamplerCustom", model, True, SEED, CFG, positive, negative, euler, sigmas, latent)[0]["samples"]


def small_network() -> Any:
    """Three levels, so that FreeU finds the widths that it looks for."""
    return network(channels=(32, 64, 128), time_scale=0.1)


def compared(drawn: list[torch.Tensor], without: list[torch.Tensor]) -> dict[str, float]:
    """Effect of a patch in the stock sampler and in ours, and how far the two pictures are apart."""
    effects = [difference(a, b) for a, b in zip(drawn, without, strict=True)]
    return {"stock": effects[0], "ours": effects[1], "apart": difference(drawn[1], drawn[0])}


def model_patches(model: Any) -> Iterator[tuple[str, Callable[[], tuple[Any, Any, Any]], Any]]:
    """Name, how to patch, and the latent."""
    texts = conditioning(seed=1), conditioning(seed=2)
    for name, cls in patch_nodes().items():
        try:
            arguments_of(name, cls, model)
        except LookupError:
            continue
        latent = masked() if name == "DifferentialDiffusion" else latents()
        yield name, lambda name=name, cls=cls: (call(name, **arguments_of(name, cls, model)), *texts), latent


def check_patches() -> dict[str, Any]:
    load_extras()
    model = small_network()
    rows = {}
    texts = conditioning(seed=1), conditioning(seed=2)
    without = {}
    for name, patched, latent in model_patches(model):
        kind = "noise_mask" in latent
        without[kind] = without.get(kind) or [sampler(model, *texts, latent) for sampler in (theirs, ours)]
        try:
            rows[name] = compared([sampler(*patched(), latent) for sampler in (theirs, ours)], without[kind])
        except Exception as error:
            rows[name] = f"{type(error).__name__}: {error}"
    return rows


if __name__ == "__main__":
    main(dict(globals()))
