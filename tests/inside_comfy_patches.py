"""Checks of what ComfyUI's own model patches do to Diff2Flow Sampler, and its own samplers to Diff2Flow Model.

Run as `inside_comfy.py` is. Every node that takes a MODEL and gives one is looked up in the ComfyUI at hand. The tables
of docs/troubleshooting.md are made of what these checks print (`bench/host_tables.py`).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from inside_comfy import conditioning, control_net, difference, kohya_lora, main, network, run_node

# isort: split
import comfy.hooks
import comfy.samplers
import folder_paths
import torch

import nodes as stock
from diff2flow_nodes.hosts import current

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
        yield (
            name,
            lambda name=name, cls=cls, rest=(*texts, latent): (call(name, **arguments_of(name, cls, model)), *rest),
        )


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
    wrong = {
        name: row for name, row in rows.items() if row["apart"] > BAR or (row["stock"] > SEEN) != (row["ours"] > SEEN)
    }
    assert not wrong, wrong
    acting = ("PatchModelAddDownscale", "SelfAttentionGuidance", "RescaleCFG", "ControlNetApplyAdvanced", "FreeU")
    assert all(rows[name]["stock"] > 5 * BAR for name in acting) and len(rows) >= 30, rows
    return rows


def sigmas_seen(model: Any, **changes: Any) -> list[float]:
    """What patches see as sigma while Diff2Flow Sampler takes four steps."""
    seen: list[float] = []

    def look(function: Callable[..., torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        seen.append(float(options["c"]["transformer_options"]["sigmas"][0]))
        return function(options["input"], options["timestep"], **options["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(look)
    inputs = {"solver": "euler", "denoise": 1.0, "start": "auto", **changes}
    image = {"samples": torch.ones(1, 4, 8, 8)}
    out = run_node("Diff2FlowSampler", watched, *[conditioning()] * 2, image, SEED, 4, 1.0, *inputs.values())[0]
    assert out["samples"].isfinite().all()
    return seen


def check_clock() -> dict[str, list[float]]:
    """A stock model is walked in sigma_k, on the very numbers of the grid, unless the walk begins at pure noise."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = network()
    [snr] = ModelSamplingDiscrete().patch(network(v=True), "v_prediction", True)
    flow = run_node("Diff2FlowModel", model, "auto", "auto", "auto", 1.0)[0]
    naive = {"diff2flow.objective": "flow_matching", "diff2flow.version": "1"}
    plain = current().apply_lora(model, None, kohya_lora(model, 1), 1.0, naive)[0]
    grids = {
        name: run_node("Diff2FlowSigmas", each, 4, "uniform", 1.0)[0][:-1].tolist()
        for name, each in (("stock", model), ("snr", snr), ("flow", flow))
    }
    found = {
        "stock": sigmas_seen(model),
        "snr": sigmas_seen(snr),
        "flow": sigmas_seen(flow),
        "from noise": sigmas_seen(model, start="noise"),
        "half, from noise": sigmas_seen(model, start="noise", denoise=0.5),
        "flow matching": sigmas_seen(plain),
    }
    assert all(found[name] == grid for name, grid in grids.items()), (found, grids)
    assert found["from noise"] == [1.0, 0.75, 0.5, 0.25], found
    assert difference(torch.tensor(found["half, from noise"]), torch.tensor([1.0, 0.6, 1 / 3, 1 / 7])) < 1e-6, found
    assert 14.0 < found["stock"][0] < 15.0 and found["snr"][0] > 4000.0 and found["flow matching"][0] <= 1.0, found
    return found


def check_warning_of_timed_patches() -> dict[str, list[str]]:
    """Diff2Flow Model names the patches in front of it that hold limits in sigma, and no others."""
    load_extras()
    from diff2flow_nodes.hosts.comfy import sampling

    class Adapter:
        """As other packs keep them: in a dictionary of an object in transformer_options."""

        def __init__(self, **limits: float) -> None:
            self.kwargs = [limits]

        def __call__(self, q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            return q

    def adapted(start: float, end: float) -> Any:
        clone = model.clone()
        adapter = Adapter(sigma_start=start, sigma_end=end)
        clone.model_options["transformer_options"].setdefault("patches_replace", {})["attn2"] = {("input", 1): adapter}
        return clone

    model = small_network()
    cases = {"Adapter": adapted(999999999.9, 2.0), "whole range": adapted(999999999.9, 0.0)}
    tried = (
        "PatchModelAddDownscale", "SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple", "CFGOverride", "EasyCache",
        "FreeU", "SelfAttentionGuidance", "RescaleCFG", "PerturbedAttentionGuidance", "DifferentialDiffusion",
    )  # fmt: skip
    for name in tried:
        if name in stock.NODE_CLASS_MAPPINGS:
            cases[name] = call(name, **arguments_of(name, stock.NODE_CLASS_MAPPINGS[name], model))
    said: dict[str, list[str]] = {}
    texts = conditioning(seed=1), conditioning(seed=2)
    for name, patched in cases.items():
        with patch.object(sampling.log, "warning") as warning:
            flow = run_node("Diff2FlowModel", patched, "auto", "auto", "auto", 1.0)[0]
            said[name] = [each.args[1] for each in warning.call_args_list]
            run_node("Diff2FlowSampler", patched, *texts, latents(), 1, 1, 1.0, "euler", 1.0, "auto")
            if name in stock.NODE_CLASS_MAPPINGS:
                behind = call(name, **arguments_of(name, stock.NODE_CLASS_MAPPINGS[name], flow))
                run_node("Diff2FlowSampler", behind, *texts, latents(), 1, 1, 1.0, "euler", 1.0, "auto")
            assert warning.call_count == len(said[name]), (name, warning.call_args_list)
    warned = {name for name, words in said.items() if words}
    limited = {"Adapter", "PatchModelAddDownscale", "SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple", "CFGOverride"}
    assert warned == limited & set(cases), said
    assert "PatchModelAddDownscale" in said["PatchModelAddDownscale"][0]
    return said


MEANS, STD, SWEPT_CFG = (0.3, -0.1), 0.7, 2.0
"""Of the data that the perfect network knows, by prompt: every latent value is normal."""
GUIDED = MEANS[1] + SWEPT_CFG * (MEANS[0] - MEANS[1])
"""Mean of what guidance makes of the two: x_data_hat is affine in the mean."""
SWEPT_STEPS = 12
SWEPT = (
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "dpm_2", "dpm_2_ancestral", "lms",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "ddpm", "lcm", "ipndm",
    "res_multistep", "res_multistep_ancestral", "uni_pc", "ddim",
)  # fmt: skip
"""Samplers that meet every scheduler; the others meet `simple`."""
NOT_FOR_FLOWS = {
    "ddpm", "dpmpp_2m_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "gradient_estimation_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "res_multistep_cfg_pp",
}  # fmt: skip
"""What docs/troubleshooting.md warns of."""


def perfect_network() -> Any:
    """ModelPatcher whose network is the perfect eps network of normal data: E[eps | x_diff] in closed form."""
    patcher = network(channels=(32,))
    kept = current().facts(patcher).schedule.alphas_cumprod.float()
    positive = conditioning(seed=1)[0][0][0, 0, 0]

    def eps(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, **options: Any) -> torch.Tensor:
        low = timesteps.floor().long().clamp(0, len(kept) - 2)
        power = torch.lerp(kept[low], kept[low + 1], (timesteps - low).clamp(0, 1)).reshape(-1, 1, 1, 1)
        mean = torch.where(context[:, 0, 0] == positive, *MEANS).reshape(-1, 1, 1, 1)
        return (1 - power).sqrt() * (x - power.sqrt() * mean) / (power * STD**2 + 1 - power)

    unet = patcher.model.diffusion_model
    unet._forward_hooks.clear()
    unet.forward = eps
    return patcher


def spread(model: Any, sampler: str, scheduler: str) -> float:
    """How far KSampler's values are from their mean, as a part of the data's deviation: 1 is right, 0 is all grey."""
    texts = conditioning(seed=1), conditioning(seed=2)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    inputs = (SEED, SWEPT_STEPS, SWEPT_CFG, sampler, scheduler, *texts, latent)
    drawn = model.model.latent_format.process_in(run_node("KSampler", model, *inputs)[0]["samples"])
    return float((drawn - GUIDED).square().mean().sqrt()) / STD


def verdict(flow: float, plain: float) -> str:
    """What a sampler makes of a flow model, beside what it makes of the stock model."""
    if not flow < 3.0:
        return "blows up"
    return "works" if abs(flow - 1.0) <= max(0.25, 1.2 * abs(plain - 1.0)) else "off"


def check_stock_samplers() -> dict[str, Any]:
    """Samplers and schedulers of KSampler on a model from Diff2Flow Model and on the stock model, on known data."""
    model = perfect_network()
    flow = run_node("Diff2FlowModel", model, "auto", "auto", "auto", 1.0)[0]
    found: dict[str, Any] = {}
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        schedulers = comfy.samplers.KSampler.SCHEDULERS if sampler in SWEPT else ["simple"]
        row = found[sampler] = {}
        for scheduler in schedulers:
            if scheduler != "diff2flow":
                parts = [round(spread(each, sampler, scheduler), 3) for each in (flow, model)]
                row[scheduler] = [verdict(*parts), *parts]
    assert {name for name, row in found.items() if row["simple"][0] != "works"} == NOT_FOR_FLOWS, found
    assert sum(len(row) for row in found.values() if len(row) > 1) >= 20 * 9, found
    return found


if __name__ == "__main__":
    main(dict(globals()))
