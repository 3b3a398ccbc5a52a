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

from inside_comfy import conditioning, control_net, difference, kohya_lora, main, network, run_node

# isort: split
import comfy.hooks
import comfy.samplers
import folder_paths
import torch

import nodes as stock

CFG, STEPS, SEED = 4.0, 6, 7
CHANNELS = (32, 64, 128)
BAR = 1e-2
SEEN = 1e-4
"""A relative difference above it is an effect."""
GIVEN = ("MODEL", "CONDITIONING", "LATENT_OPERATION", "LATENT")
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
SETTINGS: dict[str, dict[str, Any]] = {
    "PatchModelAddDownscale": {"block_number": 1, "end_percent": 0.5},
    "CFGOverride": {"cfg": 1.0, "end_percent": 0.5},
    "SkipLayerGuidanceDiTSimple": {"start_percent": 0.1, "end_percent": 0.6},
    "FreSca": {"freq_cutoff": 2, "scale_high": 1.5},
    "HyperTile": {"tile_size": 16},
    "UNetSelfAttentionMultiply": {"q": 1.5},
    "UNetCrossAttentionMultiply": {"q": 1.5},
    "Epsilon Scaling": {"scaling_factor": 1.02},
}
"""Values under which a small network on a small latent shows an effect; the others are the node's defaults."""
LEFT_OUT = {
    "Diff2Flow": "ours",
    "MiniMaxH3SigmaShift": "says what sigma is",
    "ModelMerge": "merges weights",
    "ModelSampling": "says what sigma is",
    "ModelSubtract": "merges weights",
    "TorchCompileModel": "compiles the network",
    "TrainLoraNode": "trains",
}
"""Nodes by the beginning of their names, and why they are no patches of sampling."""


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
        "LATENT": {"samples": torch.zeros(1, 4, 8, 8)},
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
    """First output of a stock node."""
    cls = stock.NODE_CLASS_MAPPINGS[name]
    done = cls.execute(**values) if hasattr(cls, "define_schema") else getattr(cls(), cls.FUNCTION)(**values)
    return getattr(done, "result", done)[0]


def latents() -> dict[str, Any]:
    return {"samples": torch.zeros(1, 4, 8, 8)}


def masked() -> dict[str, Any]:
    """An image and a mask that grows from left to right, as DifferentialDiffusion wants it."""
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return {"samples": image, "noise_mask": torch.linspace(0, 1, 64).expand(1, 1, 64, 64)}


def ours(model: Any, positive: Any, negative: Any, latent: Any) -> torch.Tensor:
    """Diff2Flow Sampler."""
    torch.manual_seed(0)
    inputs = (model, positive, negative, latent, SEED, STEPS, CFG, "euler", 1.0, "auto")
    return run_node("Diff2FlowSampler", *inputs)[0]["samples"]


def theirs(model: Any, positive: Any, negative: Any, latent: Any) -> torch.Tensor:
    """SamplerCustom with the stock euler on the same grid; the model is as it was loaded but for the patch."""
    torch.manual_seed(0)
    sigmas = run_node("Diff2FlowSigmas", model, STEPS, "uniform", 1.0)[0]
    euler = comfy.samplers.sampler_object("euler")
    return run_node("SamplerCustom", model, True, SEED, CFG, positive, negative, euler, sigmas, latent)[0]["samples"]


def small_network() -> Any:
    """Three levels, so that FreeU finds the widths that it looks for."""
    return network(channels=CHANNELS, time_scale=0.5)


Case = tuple[Any, Any, Any, Any]
"""What a sampler is given: MODEL, positive, negative, LATENT."""


def model_patches(model: Any) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Name of each node, and what makes its case anew: some patches remember the run before."""
    for name, cls in patch_nodes().items():
        try:
            arguments_of(name, cls, model)
        except LookupError:
            continue
        latent = masked() if name == "DifferentialDiffusion" else latents()
        texts = conditioning(seed=1), conditioning(seed=2)
        yield name, lambda name=name, cls=cls, rest=(*texts, latent): (call(name, **arguments_of(name, cls, model)), *rest)


def timed_conditionings(model: Any) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What acts for a part of the steps, said by the conditioning or a file."""
    positive, negative = conditioning(seed=1), conditioning(seed=2)
    early = call("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.4)
    late = call("ConditioningSetTimestepRange", conditioning=conditioning(seed=3), start=0.4, end=1.0)
    yield "ConditioningSetTimestepRange", lambda: (model, early + late, negative, latents())
    control = control_net(CHANNELS)
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(9))
    texts = run_node("ControlNetApplyAdvanced", positive, negative, control, hint, 1.0, 0.2, 0.6)
    yield "ControlNetApplyAdvanced", lambda: (model, *texts, latents())
    yield "CreateHookKeyframe", lambda: (model, hooked(model, positive), negative, latents())
    yield "HypernetworkLoader", lambda: (hypernetwork(model), positive, negative, latents())


def hooked(model: Any, texts: Any) -> Any:
    """A LoRA that acts from 30 % to 60 % of the steps."""
    hooks = comfy.hooks.create_hook_lora(kohya_lora(model, 1), 1.0, 0.0)
    frames = None
    for strength, start in ((0.0, 0.0), (1.0, 0.3), (0.0, 0.6)):
        frames = call("CreateHookKeyframe", strength_mult=strength, start_percent=start, prev_hook_kf=frames)
    hooks = call("SetHookKeyframes", hooks=hooks, hook_kf=frames)
    return comfy.hooks.set_hooks_for_conditioning(texts, hooks)


def hypernetwork(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    layers = {
        f"linear.{i}.{kind}": torch.randn(shape, generator=generator) * 0.05
        for i, shapes in enumerate((((128, 64), 128), ((64, 128), 64)))
        for kind, shape in zip(("weight", "bias"), shapes, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save({64: [layers, layers]}, Path(folder) / "small.pt")
        folder_paths.folder_names_and_paths["hypernetworks"] = ([folder], {".pt"})
        return call("HypernetworkLoader", model=model, hypernetwork_name="small.pt", strength=1.0)


def compared(make: Callable[[], Case], plain: Any) -> dict[str, float]:
    """Effect of a patch in the stock sampler and in ours, and how far the two pictures are apart."""
    case = make()
    drawn = [sampler(*(case if sampler is theirs else make())) for sampler in (theirs, ours)]
    without = [bare(sampler, plain, "noise_mask" in case[3]) for sampler in (theirs, ours)]
    effects = [difference(a, b) for a, b in zip(drawn, without, strict=True)]
    return {"stock": effects[0], "ours": effects[1], "apart": difference(drawn[1], drawn[0])}


_bare: dict[tuple[str, bool], torch.Tensor] = {}


def bare(sampler: Callable[..., torch.Tensor], model: Any, mask: bool) -> torch.Tensor:
    """The picture without a patch, drawn once."""
    key = sampler.__name__, mask
    if key not in _bare:
        _bare[key] = sampler(model, conditioning(seed=1), conditioning(seed=2), masked() if mask else latents())
    return _bare[key]


def is_for_this_model(make: Callable[[], Case]) -> bool:
    """Whether the stock sampler takes the patch at all."""
    try:
        theirs(*make())
    except Exception:
        return False
    return True


def check_patches() -> dict[str, Any]:
    """Every patch of core that works on SD1.5 does in Diff2Flow Sampler what it does in the stock sampler."""
    load_extras()
    model, rows = small_network(), {}
    for name, make in (*model_patches(model), *timed_conditionings(model)):
        if is_for_this_model(make):
            rows[name] = compared(make, model)
    wrong = {name: row for name, row in rows.items() if row["apart"] > BAR or (row["stock"] > SEEN) != (row["ours"] > SEEN)}
    assert not wrong, wrong
    timed = {"PatchModelAddDownscale", "SelfAttentionGuidance", "RescaleCFG", "ControlNetApplyAdvanced"}
    assert all(rows[name]["stock"] > 10 * BAR for name in timed - {"RescaleCFG"}), rows
    assert len(rows) >= 30, rows
    return rows


if __name__ == "__main__":
    main(dict(globals()))
