"""Checks of the sampling nodes inside ComfyUI's own process, on small networks of every family.

Run by `test_comfy_nodes.py` with ComfyUI's python, COMFYUI_DIR and the name of one check; prints one JSON line.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from comfy_process import arguments, pack  # noqa: E402  (first: it starts ComfyUI)

# isort: split
import comfy.cldm.cldm  # noqa: E402
import comfy.controlnet  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.supported_models_base  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402
from diff2flow_nodes.hosts import current  # noqa: E402

torch.set_num_threads(1)
N = pack.NODE_CLASS_MAPPINGS
CONTEXT = {"SD15": 768, "SD20": 1024, "SDXL": 2048}


def network(
    family: str = "SD15",
    v: bool = False,
    in_channels: int = 4,
    seed: int = 0,
    stored: torch.dtype = torch.float32,
    computed: torch.dtype = torch.float32,
    channels: tuple[int, ...] = (64,),
    time_scale: float = 2.0,
) -> Any:
    """ModelPatcher of a small UNet with random weights, kept in `stored` and computed in `computed`.

    Args:
        channels: of each level, multiples of the first.
        time_scale: how much it makes of its timestep; at 0.1 it is as smooth in time as a trained one.
    """
    config_class = getattr(comfy.supported_models, family)
    unet = {
        "image_size": 32, "in_channels": in_channels, "out_channels": 4, "model_channels": channels[0],
        "num_res_blocks": [1] * len(channels), "channel_mult": [each // channels[0] for each in channels],
        "transformer_depth": [1] * len(channels), "transformer_depth_output": [1, 1] * len(channels),
        "transformer_depth_middle": 1, "context_dim": CONTEXT[family], "use_spatial_transformer": True, "legacy": False,
        "use_linear_in_transformer": family != "SD15", "dtype": torch.float32, "use_temporal_attention": False,
        "adm_in_channels": 2816 if family == "SDXL" else None,
    }  # fmt: skip
    if family == "SDXL":
        unet["num_classes"] = "sequential"
    config = config_class(unet)
    config.unet_config["num_head_channels"] = 8
    config.set_inference_dtype(stored, None if stored == computed else computed)
    kind = comfy.model_base.ModelType.V_PREDICTION if v else comfy.model_base.ModelType.EPS
    base = comfy.model_base.SDXL if family == "SDXL" else comfy.model_base.BaseModel
    torch.manual_seed(seed)
    model = base(config, model_type=kind)
    for name, parameter in model.named_parameters():
        scale = (time_scale if "emb" in name else 1.0) / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        values = torch.randn(parameter.shape) * scale + (1.0 if _is_norm(name, parameter) else 0.0)
        parameter.data = values.to(parameter.dtype)
    model.diffusion_model.register_forward_hook(_quiet if v else _near_eps)
    if in_channels > 4:
        model.set_inpaint()
    model.eval()
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def _is_norm(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 1 and name.endswith("weight")


def _near_eps(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Makes random weights a tolerable eps network: near the noise x_diff is mostly eps."""
    return 0.9 * inputs[0][:, :4] + 0.1 * output


def _quiet(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return 0.3 * output


def conditioning(family: str = "SD15", seed: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    width = CONTEXT[family]
    extra = {"pooled_output": torch.randn(1, 1280, generator=generator)}
    return [[torch.randn(1, 77, width, generator=generator), extra]]


def latent(batch: int = 2, size: int = 8) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(batch, 4, size, size)}


def run_node(name: str, *args: Any) -> Any:
    """Output of one of our nodes or of a stock one, whichever API version it is written for."""
    cls = N.get(name) or stock.NODE_CLASS_MAPPINGS.get(name) or _extra(name)
    if hasattr(cls, "define_schema"):
        return tuple(cls.execute(*args).result)
    returned = getattr(cls(), cls.FUNCTION)(*args)
    return returned["result"] if isinstance(returned, dict) else returned


def _extra(name: str) -> Any:
    import comfy_extras.nodes_custom_sampler as custom

    return getattr(custom, name)


def ours(model: Any, family: str = "SD15", steps: int = 8, solver: str = "euler", latents: Any = None,
         positive: Any = None, cfg: float = 4.0, denoise: float = 1.0, start: str = "auto"
         ) -> torch.Tensor:  # fmt: skip
    positive = positive or conditioning(family, 1)
    out = run_node("Diff2FlowSampler", model, positive, conditioning(family, 2), latents or latent(), 7, steps, cfg,
                   solver, denoise, start)  # fmt: skip
    return out[0]["samples"]


def stock_custom(model: Any, family: str = "SD15", steps: int = 8, latents: Any = None, positive: Any = None,
                 cfg: float = 4.0, denoise: float = 1.0) -> torch.Tensor:  # fmt: skip
    """SamplerCustom with the stock euler and our SIGMAS."""
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = run_node("Diff2FlowSigmas", model, steps, "uniform", denoise)[0]
    positive = positive or conditioning(family, 1)
    return run_node("SamplerCustom", model, True, 7, cfg, positive, conditioning(family, 2), sampler, sigmas,
                    latents or latent())[0]["samples"]  # fmt: skip


def exact_timesteps(model: Any) -> Any:
    """A stock clone whose timestep is not rounded to an integer, to compare the arithmetic alone."""
    clone = model.clone()
    sampling = model.get_model_object("model_sampling")
    flow = run_node("Diff2FlowModel", model, "auto", "auto", "auto", 1.0)[0].get_model_object("model_sampling")

    class Exact(type(sampling)):
        def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
            return flow.timestep(sigma / (1 + sigma))

    exact = Exact(model.model.model_config)
    clone.add_object_patch("model_sampling", exact)
    return clone


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference |a - b|/|b| in the Euclidean norm."""
    return float((a - b).norm() / b.norm())


def check_euler_equals_stock() -> dict[str, float]:
    """Our sampler, and stock samplers on a stock and on a patched model, take the same Euler steps.

    "rounded" is a stock model as it is, whose timesteps are rounded to integers: reported, and compared as an image on
    a trained network in `test_comfy_host.py`; random weights are far rougher in the timestep than trained ones.
    """
    found = {}
    for family, v in (("SD15", False), ("SD20", False), ("SD20", True), ("SDXL", False)):
        model = network(family, v)
        mine = ours(model, family)
        name = f"{family}{'v' if v else ''}"
        found[name] = difference(mine, stock_custom(exact_timesteps(model), family))
        found[f"{name} rounded"] = difference(mine, stock_custom(model, family))
        patched = run_node("Diff2FlowModel", model, "auto", "auto", "auto", 1.0)[0]
        found[f"{name} KSampler"] = difference(
            mine,
            run_node("KSampler", patched, 7, 8, 4.0, "euler", "simple", conditioning(family, 1),
                     conditioning(family, 2), latent())[0]["samples"])  # fmt: skip
        found[f"{name} patched SamplerCustom"] = difference(mine, stock_custom(patched, family))
        assert max(found[name], found[f"{name} KSampler"], found[f"{name} patched SamplerCustom"]) <= 1e-5, found
    return found


def check_batch_equals_singles() -> dict[str, float]:
    model = network()
    whole = ours(model, latents=latent(3))
    singles = [ours(model, latents={**latent(1), "batch_index": [i]}) for i in range(3)]
    found = {"difference": difference(torch.cat(singles), whole)}
    assert found["difference"] <= 1e-5, found
    return found


def check_masks() -> dict[str, float]:
    """Inpainting by noise mask: what is masked out comes back unchanged, the rest does not."""
    model = network()
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1.0
    found = {}
    for name, sample in (("ours", ours), ("stock", stock_custom)):
        out = sample(model, latents={"samples": image, "noise_mask": mask})
        found[f"{name} kept"] = float((out[..., 4:] - image[..., 4:]).abs().max())
        found[f"{name} changed"] = float((out[..., :4] - image[..., :4]).abs().mean())
    assert found["ours kept"] < 1e-4 and found["ours changed"] > 0.05, found
    return found


def check_solvers_end() -> dict[str, float]:
    """Every solver brings the kept area back and leaves CFGZeroStar what it is to euler, in both clocks."""
    from comfy_extras.nodes_cfg import CFGZeroStar

    model, image = network(), 5 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    masked = {"samples": image, "noise_mask": torch.zeros(1, 1, 64, 64)}
    masked["noise_mask"][..., :32] = 1.0
    flow = run_node("Diff2FlowModel", model, "auto", "auto", "auto", 1.0)[0]
    starred = CFGZeroStar.execute(flow).result[0]
    whole = {"samples": torch.zeros(1, 4, 8, 8)}
    found, std = {}, float(ours(starred, steps=8, latents=whole).std())
    for name in ("euler", "midpoint", "heun", "ab2", "rk4", "dopri5"):
        for steps in (1, 2, 4, 25):
            out = ours(model, steps=steps, solver=name, latents=masked, cfg=1.0)
            found[f"{name} {steps}"] = float((out[..., 4:] - image[..., 4:]).abs().max())
        sampler = run_node("Diff2FlowSolver", name, 1e-3, 1e-3)[0]
        for label, target in (("flow", flow), ("stock", model)):
            sigmas = run_node("Diff2FlowSigmas", target, 4, "uniform", 1.0)[0]
            texts = (conditioning(), conditioning(seed=2))
            drawn = [
                run_node("SamplerCustom", target, True, 7, 1.0, *texts, sampler, each, masked)[0]["samples"]
                for each in (sigmas, sigmas[:1])
            ]
            found[f"{name} {label}"] = float((drawn[0][..., 4:] - image[..., 4:]).abs().max())
            assert torch.isfinite(drawn[1]).all(), name
        ratio = float(ours(starred, steps=8, solver=name, latents=whole).std()) / std
        assert 0.8 < ratio < 1.25, (name, ratio, std)
    assert max(found.values()) <= 1e-5, found
    return found


def check_image_to_image() -> dict[str, float]:
    """denoise < 1 stays near the image, nearer the lower it is, and equals the stock path."""
    model = network()
    image = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))}
    found = {str(d): difference(ours(model, latents=image, denoise=d), image["samples"]) for d in (0.1, 0.5, 1.0)}
    found["stock"] = difference(
        ours(model, latents=image, denoise=0.5), stock_custom(exact_timesteps(model), latents=image, denoise=0.5)
    )
    assert found["0.1"] < found["0.5"] < found["1.0"] and found["stock"] <= 1e-5, found
    return found


def check_control_net() -> dict[str, float]:
    """A ControlNet acts, and acts as it does on the stock path."""
    model, control = network(), control_net()
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(9))
    positive, _ = run_node(
        "ControlNetApplyAdvanced", conditioning(), conditioning(seed=2), control, hint, 1.0, 0.0, 1.0
    )
    with_control = ours(model, positive=positive)
    found = {
        "effect": difference(with_control, ours(model)),
        "stock": difference(with_control, stock_custom(exact_timesteps(model), positive=positive)),
    }
    assert found["effect"] > 0.01 and found["stock"] <= 1e-5, found
    return found


def control_net(channels: tuple[int, ...] = (64,)) -> Any:
    """CONTROL_NET with random weights, for a network of these channels."""
    torch.manual_seed(3)
    count = len(channels)
    net = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, model_channels=channels[0], hint_channels=3, num_res_blocks=[1] * count,
        channel_mult=[each // channels[0] for each in channels], transformer_depth=[1] * count,
        transformer_depth_middle=1, context_dim=768, use_spatial_transformer=True, legacy=False,
        num_head_channels=8, dtype=torch.float32, operations=comfy.ops.manual_cast)  # fmt: skip
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    return comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=None)


def check_inpainting_network() -> dict[str, float]:
    """A UNet with 9 channels samples through the stock inpainting conditioning."""
    model = network(in_channels=9)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    positive = [
        [c, {**d, "concat_latent_image": image, "concat_mask": torch.ones(1, 1, 64, 64)}] for c, d in conditioning()
    ]
    mine = ours(model, positive=positive)
    found = {"stock": difference(mine, stock_custom(exact_timesteps(model), positive=positive))}
    assert found["stock"] <= 1e-5, found
    return found


def check_every_solver() -> dict[str, float]:
    """All solvers approach one trajectory, as SAMPLER on stock and patched models too.

    Their orders are tested on smooth fields elsewhere; random weights are rough in time, so a few per cent remain.
    """
    model = network()
    fine = ours(model, steps=80, solver="rk4")
    patched = run_node("Diff2FlowModel", model, "auto", "auto", "auto", 1.0)[0]
    found = {}
    for name in ("euler", "midpoint", "heun", "ab2", "rk4", "dopri5"):
        steps = 4 if name == "dopri5" else 32
        found[name] = difference(ours(model, steps=steps, solver=name), fine)
        sampler = run_node("Diff2FlowSolver", name, 1e-4, 1e-4)[0]
        for label, target in (("patched", patched), ("stock", exact_timesteps(model))):
            sigmas = run_node("Diff2FlowSigmas", target, steps, "uniform", 1.0)[0]
            out = run_node(
                "SamplerCustom", target, True, 7, 4.0, conditioning(), conditioning(seed=2), sampler, sigmas, latent()
            )
            found[f"{name} {label}"] = difference(out[0]["samples"], fine)
    assert max(found.values()) < 0.05, found
    return found


def check_every_stock_sampler() -> dict[str, Any]:
    """Each of KSampler's samplers and schedulers runs on a model from Diff2Flow Model and ends finite."""
    patched = run_node("Diff2FlowModel", network(), "auto", "auto", "auto", 1.0)[0]
    failed = {}
    pairs = [(s, "simple") for s in comfy.samplers.KSampler.SAMPLERS]
    pairs += [("euler", s) for s in comfy.samplers.KSampler.SCHEDULERS]
    for sampler, scheduler in pairs:
        out = run_node(
            "KSampler", patched, 7, 6, 4.0, sampler, scheduler, conditioning(), conditioning(seed=2), latent(1)
        )
        samples = out[0]["samples"]
        if not torch.isfinite(samples).all() or samples.std() > 50:
            failed[f"{sampler}/{scheduler}"] = float(samples.std())
    assert not failed, failed
    return {"pairs": len(pairs)}


def check_advanced_sampler_splits() -> dict[str, float]:
    """KSamplerAdvanced in two halves with leftover noise gives what one run gives."""
    patched = run_node("Diff2FlowModel", network(), "auto", "auto", "auto", 1.0)[0]
    common = (7, 8, 4.0, "euler", "simple", conditioning(), conditioning(seed=2))
    whole = run_node("KSamplerAdvanced", patched, "enable", *common, latent(), 0, 10000, "disable")[0]
    first = run_node("KSamplerAdvanced", patched, "enable", *common, latent(), 0, 4, "enable")[0]
    second = run_node("KSamplerAdvanced", patched, "disable", *common, first, 4, 10000, "disable")[0]
    found = {"difference": difference(second["samples"], whole["samples"])}
    assert found["difference"] <= 1e-5, found
    return found


def check_nothing_left_patched() -> dict[str, bool]:
    model = network()
    common = (7, 6, 4.0, "euler", "normal", conditioning(), conditioning(seed=2))
    before = run_node("KSampler", model, *common, latent())[0]["samples"]
    ours(model)
    ours(model, start="noise", solver="heun")
    after = run_node("KSampler", model, *common, latent())[0]["samples"]
    assert torch.equal(before, after)
    return {"bit-equal": True}


def check_starts_and_shift() -> dict[str, float]:
    model = network()
    N_ = pack.NODE_CLASS_MAPPINGS
    sigmas = {}
    for start in ("noise", "terminal"):
        patched = run_node("Diff2FlowModel", model, "auto", "auto", start, 1.0)[0]
        sigmas[start] = run_node("Diff2FlowSigmas", patched, 4, "uniform", 1.0)[0]
        ms = patched.get_model_object("model_sampling")
        assert ms.percent_to_sigma(0.0) == 1.0 and ms.percent_to_sigma(1.0) == 0.0
        assert type(ms)(model.model.model_config).diff2flow.start == start
        assert float(ms.timestep(torch.tensor(1.0))) == 999.0 and float(ms.timestep(torch.tensor(0.0))) == 0.0
    assert float(sigmas["noise"][0]) == 1.0 and abs(float(sigmas["terminal"][0]) - (1 - 0.0640425)) < 1e-6
    shifted = run_node("Diff2FlowModel", model, "auto", "auto", "noise", 3.0)[0]
    middle = float(run_node("Diff2FlowSigmas", shifted, 4, "uniform", 1.0)[0][2])
    assert abs(middle - 0.75) < 1e-6, middle
    assert len(N_) >= 6
    return {"shifted middle": middle}


def check_bad_input() -> dict[str, str]:
    """Each bad input is refused in a sentence that names the node and the value."""
    model = network()
    broken = {"samples": torch.full((1, 4, 8, 8), float("nan"))}
    sd3 = _flow_model()
    attempts: dict[str, Callable[[], Any]] = {
        "steps 0": lambda: ours(model, steps=0),
        "NaN": lambda: ours(model, latents=broken),
        "NaN or infinite": lambda: ours(_poisoned()),
        "16 channels": lambda: ours(model, latents={"samples": torch.ones(1, 16, 8, 8)}),
        "zero-terminal-SNR": lambda: run_node("Diff2FlowModel", model, "eps", "on", "auto", 1.0),
        "denoise": lambda: ours(model, denoise=0.0),
        "SD3": lambda: ours(sd3),
        "shift": lambda: run_node("Diff2FlowModel", model, "auto", "auto", "auto", 0.0),
    }
    said = {}
    for word, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            said[word] = str(error)
        else:
            raise AssertionError(f"{word}: nothing was refused")
        assert said[word].startswith("Diff2Flow ") and "\n" not in said[word], said[word]
        assert word.split()[0] in said[word], said[word]
    return said


def check_distilled_schedules() -> dict[str, float]:
    """50 of 1000 timesteps, as of lcm: the flow is the checkpoint's own; what cannot be told is refused."""
    from comfy_extras.nodes_model_advanced import LCM, ModelSamplingDiscrete, ModelSamplingDiscreteDistilled

    host, model = current(), network()
    [lcm] = ModelSamplingDiscrete().patch(model, "lcm", False)
    found = {"lcm": difference(ours(lcm), ours(model))}
    grids = [run_node("Diff2FlowSigmas", each, 4, "uniform", 1.0)[0] for each in (lcm, model)]
    found["sigmas"] = difference(*grids)
    with host.training(lcm) as ours_in, host.training(model) as plain:
        assert ours_in.schedule == plain.schedule and ours_in.prediction == "eps" and ours_in.schedule.steps == 1000

    class AnimateDiff(ModelSamplingDiscreteDistilled, LCM):
        """As its pack makes it: betas even from 0.00085 to 0.012."""

        def _register_schedule(self, *args: Any, **kwargs: Any) -> None:
            super()._register_schedule(*args, **{**kwargs, "beta_schedule": "sqrt_linear"})

    even = model.clone()
    even.add_object_patch("model_sampling", AnimateDiff(model.model.model_config))
    kept = torch.cumprod(1.0 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0)
    found["even betas"] = float((host.facts(even).schedule.alphas_cumprod / kept - 1).abs().max())
    other = model.clone()
    other.add_object_patch("model_sampling", AnimateDiff(model.model.model_config))
    other.get_model_object("model_sampling").set_sigmas(torch.linspace(0.1, 14.0, 50))
    said = refused(lambda: ours(other))
    assert "ModelSamplingDiscrete" in said and "take that node out" in said, said
    assert max(found.values()) <= 1e-5, found
    return found


def check_sampling_nodes_in_front() -> dict[str, str]:
    """An SD1.x model behind another model sampling is told which node to take out, in sampling and in training."""
    import comfy_extras.nodes_model_advanced as advanced

    model = network()
    patched = {
        "ModelSamplingContinuousEDM": advanced.ModelSamplingContinuousEDM().patch(model, "eps", 120.0, 0.002)[0],
        "ModelSamplingContinuousV": advanced.ModelSamplingContinuousV().patch(model, "v_prediction", 500.0, 0.03)[0],
        "ModelSamplingSD3": advanced.ModelSamplingSD3().patch(model, 3.0)[0],
        "ModelSamplingStableCascade": advanced.ModelSamplingStableCascade().patch(model, 2.0)[0],
        "ModelSamplingDiscrete": advanced.ModelSamplingDiscrete().patch(model, "img_to_img", False)[0],
    }
    said = {}
    for node, each in patched.items():
        said[node] = refused(lambda each=each: ours(each))
        assert refused(lambda each=each: current().facts(each)) in said[node]
        assert node in said[node] and "out" in said[node] and "cannot convert" not in said[node], said[node]
    return said


def refused(attempt: Callable[[], Any]) -> str:
    """What an attempt is refused with."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def _poisoned() -> Any:
    model = network()
    model.model.diffusion_model.out[2].weight.data[:] = float("nan")
    return model


def _flow_model() -> Any:
    """A ModelPatcher whose base is ComfyUI's SD3 class, without its network."""
    config = comfy.supported_models.SD3({"in_channels": 16, "disable_unet_model_creation": True})
    model = comfy.model_base.SD3(config)
    model.diffusion_model = torch.nn.Identity()
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def kohya_lora(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """A rank-2 LoRA on every cross-attention query and value of a small network."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_v")):
            key = "lora_unet_" + name.replace(".", "_")
            state[f"{key}.lora_down.weight"] = torch.randn(2, module.weight.shape[1], generator=generator)
            state[f"{key}.lora_up.weight"] = torch.randn(module.weight.shape[0], 2, generator=generator)
            state[f"{key}.alpha"] = torch.tensor(1.0)
    return state


def check_loras() -> dict[str, float]:
    """LoRAs stack, do nothing at strength 0, name a foreign base, and hand on where sampling starts."""
    from diff2flow_nodes.hosts import current

    host, model = current(), network()
    first, second = kohya_lora(model, 1), kohya_lora(model, 2)
    one = host.apply_lora(model, None, first, 1.0, {"diff2flow.start": "noise", "diff2flow.version": "1"})[0]
    both = host.apply_lora(one, None, second, 0.5, None)[0]
    plain = ours(model)
    assert torch.equal(plain, ours(host.apply_lora(model, None, first, 0.0, None)[0]))
    assert host.facts(one).loras and host.facts(both).loras and not host.facts(model).loras
    assert (
        float(
            run_node(
                "Diff2FlowSigmas", run_node("Diff2FlowModel", both, "auto", "auto", "auto", 1.0)[0], 4, "uniform", 1.0
            )[0][0]
        )
        == 1.0
    )
    found = {"one": difference(ours(one), plain), "both": difference(ours(both), ours(one))}
    assert found["one"] > 0.01 and found["both"] > 0.01, found
    try:
        host.apply_lora(network("SD20"), None, first, 1.0, {"ss_base_model_version": "sd_v1"})
    except ValueError as error:
        assert "SD2" in str(error) and "sd_v1" in str(error)
    else:
        raise AssertionError("a LoRA for SD1 was taken on SD2")
    return found


def text_encoder(layers: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """CLIP of SD1.x with random weights and few layers."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    options = {"clip_l_model_config": {"num_hidden_layers": layers}, "dtype": dtype}
    clip = comfy.sd.CLIP(target, model_options=options)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in clip.cond_stage_model.named_parameters():
        scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.05
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = (values + (1.0 if _is_norm(name, parameter) else 0.0)).to(dtype)
    return clip


def forward(model: Any) -> torch.Tensor:
    """One call of the network with its patches in it."""
    comfy.model_management.load_models_gpu([model])
    return bare(model.model.diffusion_model)


def bare(unet: Any) -> torch.Tensor:
    """One call of a network as it is."""
    generator = torch.Generator().manual_seed(6)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 768, generator=generator)
    return unet(x, torch.tensor([10.0, 700.0]), context=context, transformer_options={})


def moved(adapters: Any) -> None:
    """Trained layers away from where they begin."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def check_lora_kinds() -> dict[str, float]:
    """LoRA, rsLoRA and DoRA files give in ComfyUI's own loader the network that was trained, at any strength."""
    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.training.adapters import trainable
    from diff2flow_nodes.training.layers import GROUPS, LoraSettings

    host, found = current(), {}
    for kind in ({}, {"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}):
        name, model = "+".join(kind) or "lora", network()
        settings = LoraSettings(groups=GROUPS, rank=8, alpha=4.0, ends_in_full=True, **kind)
        with host.training(model) as backbone, torch.no_grad():
            untouched = bare(backbone.module)
            with trainable(backbone, settings, 0) as adapters:
                assert torch.equal(bare(backbone.module), untouched), name
                moved(adapters)
                trained, state = bare(backbone.module), adapters.state()
        plain = forward(model)
        for strength in (1.0, 0.5):
            stock_model = comfy.sd.load_lora_for_models(model, None, dict(state), strength, strength)[0]
            ours_model = host.apply_lora(model, None, state, strength, None)[0]
            once = forward(stock_model)
            assert torch.equal(once, forward(ours_model)), name
            if strength == 1.0:
                effect = (once - plain).abs().max()
                found[name] = float((once - trained).abs().max() / effect)
    assert max(found.values()) < 1e-3, found
    return found


def checkpoint_of(model: Any, clip: Any, path: Path) -> Path:
    """A checkpoint file of ComfyUI's networks."""
    from safetensors.torch import save_file

    state = {f"model.{name}": value for name, value in model.model.state_dict().items() if name.startswith("diff")}
    for name, value in {} if clip is None else clip.cond_stage_model.state_dict().items():
        if name.startswith("clip_l.transformer.text_model."):
            state[f"cond_stage_model.{name.removeprefix('clip_l.')}"] = value
    save_file({name: value.float().contiguous() for name, value in state.items()}, path)
    return path


def headless_twin(model: Any, clip: Any = None) -> tuple[Any, Any, dict[str, str]]:
    """The same networks in the headless host, and its names of weights by ComfyUI's."""
    import tempfile

    from diff2flow_nodes.hosts.headless.checkpoint import load_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint_of(model, clip, Path(folder) / "twin.safetensors")
        mine, text, _ = load_checkpoint(path, path.name, torch.device("cpu"))
    twins = {}
    for ldm, module in mine.base.ldm_names.items():
        twins |= {f"diffusion_model.{ldm}.{part}": f"{module}.{part}" for part in ("weight", "bias")}
    for name, _ in text.weights.module.named_parameters() if text else ():
        inner = name.removeprefix("l.model.").removeprefix("text_model.")
        twins[f"clip_l.transformer.text_model.{inner}"] = name
    return mine, text, twins


def patched(owner: Any) -> dict[str, torch.Tensor]:
    """Weights as ComfyUI computes them from a clone's patches, by its keys."""
    import comfy.lora

    patcher = getattr(owner, "patcher", owner)
    weights = patcher.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, weights[key].float().clone(), key)
        for key, patches in patcher.patches.items()
    }


def merged(owner: Any, weights: Any) -> dict[str, torch.Tensor]:
    """Weights as headless computes them from its patches, by its names."""
    values = dict(weights.merged(owner.patches).named_parameters())
    return {patch.target: values[patch.target] for patch in owner.patches}


def both_hosts(model: Any, clip: Any, twin: Any, state: Any, strength: float) -> float:
    """Largest relative difference of a changed weight between the hosts; each must change the same ones."""
    from diff2flow_nodes.hosts.headless.lora import apply_lora

    mine, text, twins = twin
    theirs = current().apply_lora(model, clip, state, strength, None)
    ours_ = apply_lora(mine, text, state, (strength, strength))
    expected = {twins[key]: value for each in theirs if each is not None for key, value in patched(each).items()}
    found = merged(ours_[0], mine.base.weights)
    found |= merged(ours_[1], text.weights) if text else {}
    before = {
        **dict(mine.base.weights.module.named_parameters()),
        **dict(text.weights.module.named_parameters() if text else ()),
    }
    assert found.keys() == expected.keys() and found, (sorted(state), sorted(found), sorted(expected))
    for name, value in expected.items():
        assert not torch.allclose(value, before[name], atol=1e-3), (name, sorted(state), "has no effect")
    return max(
        float((found[name] - value).abs().max() / (value - before[name]).abs().max())
        for name, value in expected.items()
    )


QUERY = (
    "input_blocks.1.1.transformer_blocks.0.attn2.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q",
)
OUT = (
    "middle_block.1.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
)
CONVOLVED = ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1")
NORMED = ("input_blocks.1.0.in_layers.0", "down_blocks.0.resnets.0.norm1")


def check_lora_files() -> dict[str, float]:
    """Every kind and spelling of LoRA files does the same to the same weights in both hosts.

    ComfyUI's own arithmetic on what its loader makes of the file is what headless is measured by.
    """
    from diff2flow_nodes.tests import lora_files

    model, clip = network(), text_encoder()
    twin, shapes, found = headless_twin(model, clip), dict(model.model.state_dict()), {}
    cases = [(kind, QUERY[0]) for kind in lora_files.LINEAR] + [("norm", NORMED[0])]
    cases += [(kind, CONVOLVED[0]) for kind in lora_files.CONVOLUTION]
    for kind, ldm in cases:
        weight = shapes[f"diffusion_model.{ldm}.weight"]
        parts = lora_files.layer(kind, weight.shape)
        if ldm == QUERY[0]:
            parts.pop("diff_b", None)  # it has no bias
        state = {f"lora_unet_{ldm.replace('.', '_')}.{part}": value for part, value in parts.items()}
        for strength in (1.0, 0.5, -0.7):
            found[f"{kind} {weight.ndim}d {strength}"] = both_hosts(model, clip, twin, state, strength)
    text = "text_model_encoder_layers_1_mlp_fc1"
    for kind in ("lora", "loha", "lokr"):
        state = {f"lora_te_{text}.{part}": value for part, value in lora_files.layer(kind, (3072, 768)).items()}
        found[f"text {kind}"] = both_hosts(model, clip, twin, state, 0.5)
    bias = {"diffusion_model.out.2.bias.diff": torch.ones(4)}
    found["bias"] = both_hosts(model, clip, twin, bias, 0.5)
    assert max(value for name, value in found.items() if "text" not in name) < 1e-4, found
    assert max(found.values()) < 5e-3, found  # text encoders are kept in half precision
    return {"files": len(found), "largest difference": max(found.values())}


def check_lora_spellings() -> dict[str, int]:
    """What ComfyUI's loader calls a layer is the same weight in headless, and so it is in PEFT's and diffusers' words."""
    import comfy.lora

    from diff2flow_nodes.tests import lora_files
    from diff2flow_nodes.training.lora_keys import read_keys

    count = 0
    for family, clip in (("SD15", text_encoder()), ("SD20", None), ("SDXL", None)):
        model = network(family)
        twin = headless_twin(model, clip)
        known, names = comfy.lora.model_lora_keys_unet(model.model, {}), dict(twin[0].base.layer_names)
        weights = set(model.model.state_dict())
        if clip is not None:
            comfy.lora.model_lora_keys_clip(clip.cond_stage_model, known)
            names, weights = names | twin[1].layer_names(), weights | set(clip.cond_stage_model.state_dict())
        for name, key in known.items():
            if key not in twin[2]:  # of a layer that this network has not got, or that SD1's text encoder makes up
                assert key not in weights or "text_projection" in key, name
                continue
            layer = next(iter(read_keys({f"{name}.diff": torch.ones(1)}).layers))
            path = names[layer]
            assert (path if path.endswith(".bias") else f"{path}.weight") == twin[2][key], (name, layer)
            assert known[layer] == key, (name, layer)
            count += 1
    model = network()
    twin, weights = headless_twin(model), model.model.state_dict()
    for ldm, diffusers in (QUERY, OUT):
        for name in lora_files.names(ldm, diffusers):
            for endings in lora_files.ENDINGS:
                state = lora_files.spelled(name, weights[f"diffusion_model.{ldm}.weight"].shape, endings)
                assert both_hosts(model, None, twin, state, 1.0) < 1e-4, (name, endings)
                assert set(patched(current().apply_lora(model, None, state, 1.0, None)[0])) == {
                    f"diffusion_model.{ldm}.weight"
                }
                count += 1
    return {"names": count}


def check_lora_refusals() -> dict[str, str]:
    """What cannot be applied is refused by name, and what is left out is said in one sentence."""
    from diff2flow_nodes.tests import lora_files

    host, model = current(), network()
    text = {f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.{part}": value for i in range(3)
            for part, value in lora_files.layer("lora", (3072, 768)).items()}  # fmt: skip
    unet = f"lora_unet_{QUERY[0].replace('.', '_')}"
    found = {
        "text": refused(lambda: host.apply_lora(model, None, text, 1.0, None)),
        "foreign": refused(lambda: host.apply_lora(model, None, {f"{unet}.on_input": torch.zeros(1)}, 1.0, None)),
        "half": refused(lambda: host.apply_lora(model, None, {f"{unet}.lora_up.weight": torch.ones(1)}, 1.0, None)),
        "nowhere": refused(lambda: host.apply_lora(model, None, {"lora_unet_nowhere.diff": torch.ones(1)}, 1.0, None)),
    }
    for name, words in {"text": "changes the text encoder only (3 layers", "foreign": "IA3 (1 tensors)",
                        "half": "lacks lora_down.weight", "nowhere": "none of the LoRA's 1 layers"}.items():  # fmt: skip
        assert words in found[name], found
    assert "another base" not in found["text"], found
    with log_lines() as lines:
        host.apply_lora(model, None, kohya_lora(model, 1) | text, 1.0, None)
    assert len(lines) == 1 and "3 of the LoRA's 11 layers belong to the text encoder" in lines[0], lines
    return {**found, "left out": lines[0]}


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """What is logged meanwhile, warnings and above."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


def slim_file(folder: Path) -> Path:
    """The smallest checkpoint that ComfyUI takes for Stable Diffusion 1.x, without text encoder and autoencoder."""
    from ldm_layout import unet_to_ldm
    from safetensors.torch import save_file

    from diff2flow_nodes.tests.headless_fixtures import unet_weights

    weights = unet_to_ldm(unet_weights("SD1", (320,), (True,)), blocks=1)
    path = folder / "slim.safetensors"
    save_file({f"model.diffusion_model.{name}": value.half().contiguous() for name, value in weights.items()}, path)
    return path


def check_base_names() -> dict[str, Any]:
    """The file behind ComfyUI's own loaders is named where this version tells it, and never where models were mixed."""
    import tempfile

    import folder_paths

    from diff2flow_nodes.files import sha256_of

    host, found = current(), {}
    with tempfile.TemporaryDirectory() as name:
        path = slim_file(Path(name))
        folders = {"checkpoints": Path(name), "diffusion_models": Path(name)}
        before = {kind: list(folder_paths.get_folder_paths(kind)) for kind in folders}
        for kind, folder in folders.items():
            folder_paths.add_model_folder_path(kind, str(folder))
        simple = stock.CheckpointLoaderSimple().load_checkpoint(path.name)[0]
        alone = stock.UNETLoader().load_unet(path.name, "default")[0]
        tells = getattr(simple, "cached_patcher_init", None) is not None
        mixed = simple.clone()
        mixed.add_patches(simple.get_key_patches("diffusion_model.out."), 0.5, 0.5)
        tuned = host.apply_lora(simple, None, kohya_lora(simple, 1), 1.0, None)[0]
        for what, model in {"simple": simple, "alone": alone, "mixed": mixed, "tuned": tuned}.items():
            with host.training(model) as backbone:
                told = tells and what != "mixed"
                assert backbone.base_name == (path.name if told else ""), (what, backbone.base_name)
                assert backbone.base_hash == (sha256_of(path) if told else ""), what
                assert backbone.base_path == (path if tells else None), what
            found[what] = backbone.base_name
        other = comfy.model_patcher.ModelPatcher(simple.model, simple.load_device, simple.offload_device)
        other.cached_patcher_init = (slim_file, (str(path),))
        with host.training(other) as backbone:
            assert (backbone.base_name, backbone.base_path) == ("", None)
    # of a folder that is gone nothing is found, and nothing fails
    gone = host.facts(network()).base_name
    for kind, paths in before.items():
        folder_paths.folder_names_and_paths[kind][0][:] = paths
    folder_paths.filename_list_cache.clear()
    assert gone == ""
    return {"tells": tells, **found}


def check_stored_formats() -> dict[str, int]:
    """Weights in fp16, bf16 and fp8 train in place: the frozen ones stay where and what they are."""
    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.training.adapters import trainable
    from diff2flow_nodes.training.layers import GROUPS, LoraSettings

    found = {}
    for stored in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        model = network(stored=stored)
        for dora in (False, True):
            settings = LoraSettings(groups=GROUPS, rank=4, alpha=4.0, ends_in_full=True, dora=dora)
            if dora and stored == torch.float8_e4m3fn:
                continue
            with current().training(model) as backbone:
                before = {p.data_ptr(): p.dtype for p in backbone.module.parameters()}
                plain = bare(backbone.module)
                with trainable(backbone, settings, 0) as adapters:
                    assert torch.equal(bare(backbone.module), plain), (stored, dora)
                    moved(adapters)
                    bare(backbone.module).square().mean().backward()
                    trained = {id(p) for p in adapters.parameters()}
                    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapters.parameters())
                    assert all(p.grad.isfinite().all() for p in adapters.parameters())
                    others = {p.data_ptr(): p.dtype for p in backbone.module.parameters() if id(p) not in trained}
                    assert others == before and set(before.values()) == {stored}, (stored, dora)
            found[f"{stored} {'dora' if dora else 'lora'}"] = len(others)
    return found


def check_full_finetuning() -> dict[str, float]:
    """Preset full trains every parameter, writes them into a checkpoint, and puts the very originals back."""
    import tempfile

    from safetensors.torch import load_file, save_file

    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.training.adapters import trainable
    from diff2flow_nodes.training.checkpoint_file import save_checkpoint
    from diff2flow_nodes.training.layers import PRESETS

    model, found = network(stored=torch.float16), {}
    unet = model.model.diffusion_model
    with tempfile.TemporaryDirectory() as folder, current().training(model) as backbone:
        base, path = Path(folder) / "base.safetensors", Path(folder) / "tuned.safetensors"
        save_file({f"model.diffusion_model.{k}": v.contiguous() for k, v in unet.state_dict().items()}, base)
        backbone.base_path = base
        originals, plain = list(unet.parameters()), bare(unet)
        with trainable(backbone, PRESETS["full"], 0) as full:
            assert full.size == sum(p.numel() for p in originals)
            found["fresh"] = float((bare(unet) - plain).detach().abs().max())
            optimizer = torch.optim.SGD(full.parameters(), lr=1e-3)
            bare(unet).square().mean().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in full.parameters())
            optimizer.step()
            found["moved"] = float((bare(unet) - plain).detach().abs().max())
            save_checkpoint(path, base, full.tensors, {"diff2flow.version": "1"}, torch.float32)
            saved, values = load_file(path), full.state()
        assert all(a is b for a, b in zip(unet.parameters(), originals, strict=True))
        assert torch.equal(bare(unet), plain)
        assert saved.keys() == values.keys() and all(torch.equal(saved[key], values[key]) for key in saved)
    assert found["fresh"] == 0.0 and found["moved"] > 1e-4, found
    return found


def check_text_encoder_lora() -> dict[str, float]:
    """The text encoder's LoRA gets a gradient, and its file changes the stock encoding as training saw it."""
    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.training.adapters import trainable
    from diff2flow_nodes.training.layers import LoraSettings

    host, model, found = current(), network(), {}
    captions = ["a red (fox:1.3)", "a cat, " * 40, "a red (fox:1.3)"]
    for kind in ("lora", "dora"):
        clip = text_encoder()
        before = [clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True) for caption in captions]
        settings = LoraSettings(groups=(), rank=4, alpha=4.0, dora=kind == "dora", text_encoder=True)
        with host.training(model, clip) as backbone, trainable(backbone, settings, 0) as adapters:
            fresh, pooled = backbone.text.encode(captions)
            assert torch.equal(fresh[1], before[1][0][0]) and torch.equal(pooled[0], before[0][1][0]), kind
            moved(adapters)
            context, _ = backbone.text.encode(captions)
            backbone(torch.randn(3, 4, 8, 8), torch.tensor([1.0, 500.0, 900.0]), {"context": context}).sum().backward()
            assert all(p.grad.abs().sum() > 0 for p in adapters.parameters()), kind
            trained, state = context.detach(), adapters.state()
        assert all(key.startswith("lora_te_text_model_encoder_layers_") for key in state)
        tuned = comfy.sd.load_lora_for_models(None, clip, dict(state), 1.0, 1.0)[1]
        length = trained.shape[1]
        after = [tuned.encode_from_tokens(tuned.tokenize(caption)) for caption in captions]
        nothing = tuned.encode_from_tokens(tuned.tokenize(""))  # what the encoder fills a short prompt's chunks with
        after = torch.cat([torch.cat([each, *[nothing] * ((length - each.shape[1]) // 77)], dim=1) for each in after])
        assert length == max(each.shape[1] for each, _ in before) == 154
        found[kind] = float((after - trained).abs().max() / (trained - fresh.detach()).abs().max())
        ours_clip = host.apply_lora(model, clip, state, 1.0, None)[1]
        again = ours_clip.encode_from_tokens(ours_clip.tokenize(captions[1]))
        assert torch.equal(again[0], after[1])
        unchanged = clip.encode_from_tokens(clip.tokenize(captions[0]))
        assert torch.equal(unchanged, before[0][0]), kind
    assert max(found.values()) < 1e-3, found
    return found


def check_reflow_teacher() -> dict[str, float]:
    """The teacher's latents are those of Diff2Flow Sampler from the same noise, LoRA and SDXL's sizes included."""
    import comfy.sample

    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.hosts.choice import flow_of
    from diff2flow_nodes.training.teacher import Teacher, TeacherSettings

    host, found = current(), {}
    for family, start, cfg in (("SD15", "terminal", 4.0), ("SD15", "noise", 1.0), ("SDXL", "terminal", 4.0)):
        model = network(family)
        if family == "SD15":
            model = host.apply_lora(model, None, kohya_lora(model, 1), 1.0, None)[0]
        drawn = ours(model, family, 4, "heun", cfg=cfg, start=start)
        noise = comfy.sample.prepare_noise(latent()["samples"], 7)
        sides = [conditioning(family, 1), conditioning(family, 2)][: 2 if cfg != 1.0 else 1]
        context = torch.cat([side[0][0] for side in sides for _ in range(2)])
        pooled = torch.cat([side[0][1]["pooled_output"] for side in sides for _ in range(2)])
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(len(context), -1)
        flow = flow_of(host.facts(model), start)
        with torch.inference_mode(False), host.training(model) as backbone:
            inputs = [each.clone() for each in (noise, context, pooled)]
            made = Teacher(backbone, flow, TeacherSettings(4, cfg, "heun"))(*inputs, sizes)
        found[f"{family} {start}"] = difference(made, drawn)
    assert max(found.values()) < 2e-3, found
    return found


def check_fingerprint() -> dict[str, str]:
    """A model keeps its fingerprint while clones of it are sampled as flows, with LoRAs and without."""
    from diff2flow_nodes.hosts import current

    host, model = current(), network(stored=torch.float16)
    tuned = host.apply_lora(model, None, kohya_lora(model, 1), 1.0, {"diff2flow.start": "noise"})[0]
    flow = run_node("Diff2FlowModel", model, "auto", "auto", "auto", 3.0)[0]
    before = [host.fingerprint(each) for each in (model, tuned, flow)]
    assert len(set(before)) == 3, before
    for sampled in (model, tuned, flow):
        ours(sampled)
        assert [host.fingerprint(each) for each in (model, tuned, flow)] == before
    return {"model": before[0]}


def check_reflow_pairs() -> dict[str, Any]:
    """The node under inference mode; a second run finds its pairs though the LoRA has been merged meanwhile."""
    from diff2flow_nodes.hosts import current

    model, clip = network(), text_encoder()
    model = current().apply_lora(model, None, kohya_lora(model, 1), 1.0, None)[0]
    folder = f"reflow_check_{os.getpid()}"
    inputs = (model, clip, "a fox\na {red|blue} cat", 4, 2, 3.0, 0, folder, None, "", "bad", 64, 64)
    try:
        first, summary = run_node("Diff2FlowReflowPairs", *inputs)
        again, _ = run_node("Diff2FlowReflowPairs", *inputs)
        with torch.inference_mode(False):
            batch = again.batch(range(4))
        shards = list((current().folder("datasets") / folder).glob("pairs-*"))
    finally:
        shutil.rmtree(current().folder("datasets") / folder, ignore_errors=True)
    assert len(first) == len(again) == 4 and len(shards) == 1 and batch.noise.shape == (4, 4, 8, 8), summary
    assert batch.latent.isfinite().all() and not any(x.is_inference() for x in (batch.latent, batch.context))
    return {"summary": summary, "spread": float(batch.latent.std())}


def extra(module: str, name: str, *args: Any) -> Any:
    """First output of a node of ComfyUI's extras, whichever API version it is written for."""
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(cls, "define_schema"):
        return cls.execute(*args).result[0]
    return getattr(cls(), cls.FUNCTION)(*args)[0]


class _Hypernetwork:
    def __call__(self, q: Any, k: Any, v: Any, extra_options: Any) -> tuple[Any, Any, Any]:
        return q, 3.0 * k, v


def _doubled(apply_model: Any, given: Any) -> Any:
    return 2.0 * apply_model(given["input"], given["timestep"], **given["c"])


def _weighed(args: Any) -> Any:
    return args["cond"]


def check_patches_of_sampling() -> dict[str, Any]:
    """Those that training and pairs do not call are named; they change what is sampled, and no pair."""
    from diff2flow_nodes.hosts.choice import flow_of

    plain, clip = network(), text_encoder()
    patched = extra("nodes_freelunch", "FreeU_V2", plain, 1.3, 1.4, 0.9, 0.2)
    patched = extra("nodes_pag", "PerturbedAttentionGuidance", patched, 3.0)
    patched = patched.clone()
    patched.set_model_attn2_patch(_Hypernetwork())
    patched.set_model_attn2_replace(_weighed, "middle", 0)
    patched.set_model_unet_function_wrapper(_doubled)
    patched.set_model_sampler_cfg_function(_weighed)
    patched.add_wrapper_with_key("diffusion_model", "test", _doubled)
    host = current()
    found = host.sampling_patches(patched)
    assert set(found) == {
        "FreeU_V2 (output_block_patch)", "PerturbedAttentionGuidance (sampler_post_cfg_function)",
        "_Hypernetwork (attn2_patch)", "_weighed (attn2)", "_doubled (model_function_wrapper)",
        "_weighed (sampler_cfg_function)", "_doubled (diffusion_model wrapper)",
    }, found  # fmt: skip
    lora = host.apply_lora(plain, None, kohya_lora(plain, 1), 1.0, None)[0]
    seeing_image = host.apply_lora(plain, None, depth_lora(plain)[0], 1.0, None)[0]
    for none in (plain, lora, seeing_image, host.as_flow(plain, flow_of(host.facts(plain)))):
        assert host.sampling_patches(none) == (), host.sampling_patches(none)
    freed = plain.clone()
    freed.set_model_unet_function_wrapper(_doubled)
    sampled = difference(ours(freed), ours(plain))
    made, summaries, folders = [], [], [f"patches_{os.getpid()}_{i}" for i in range(2)]
    try:
        for model, folder in zip((plain, freed), folders, strict=True):
            pairs, summary = run_node("Diff2FlowReflowPairs", model, clip, "a fox", 2, 2, 3.0, 0, folder, None, "", "",
                                      64, 64)  # fmt: skip
            with torch.inference_mode(False):
                made.append(pairs.batch(range(2)).latent)
            summaries.append(summary)
    finally:
        for folder in folders:
            shutil.rmtree(host.folder("datasets") / folder, ignore_errors=True)
    assert torch.equal(*made) and sampled > 1e-2, sampled
    line = "model: the following patches have no effect on the pairs, which the bare network makes: _doubled"
    assert line not in summaries[0] and line in summaries[1], summaries
    return {"patches": found, "sampled": sampled}


def check_networks_that_take_more() -> dict[str, str]:
    """unCLIP: a sentence instead of a KeyError from the middle of ComfyUI; it is sampled as ever."""
    model = unclip()
    assert ours(model, "SD20").isfinite().all()
    said = {}
    for name, inputs in {
        "Diff2FlowReflowPairs": {"clip": text_encoder(), "prompts": "a fox", "count": 1, "steps": 1, "cfg": 1.0,
                                 "seed": 0, "folder": f"unclip_{os.getpid()}", "width": 64, "height": 64},
    }.items():  # fmt: skip
        try:
            getattr(N[name](), N[name].FUNCTION)(model=model, **inputs)
        except ValueError as error:
            said[name] = str(error)
        else:
            raise AssertionError(f"{name} did it")
        assert "model: the network of a SD21UNCLIP" in said[name] and "choose a plain checkpoint" in said[name], said
    return said


def unclip() -> Any:
    """ModelPatcher of a small unCLIP network."""
    config = comfy.supported_models.SD21UnclipL({**network("SD20").model.model_config.unet_config})
    config.unet_config.update(adm_in_channels=1536, num_classes="sequential", num_head_channels=8)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = comfy.model_base.SD21UNCLIP(config, config.noise_aug_config, comfy.model_base.ModelType.V_PREDICTION)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.3 / max(1, parameter[0].numel()) ** 0.5)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=device)


def check_wrong_sockets() -> dict[str, str]:
    """A MODEL, CLIP, VAE or LATENT where another belongs, and a CFG that is no number: one sentence each."""
    from diff2flow_nodes.bench import ldm_layout
    from diff2flow_nodes.bench.tiny_taesd import block_mean_autoencoder
    from diff2flow_nodes.nodes.sockets import kind_of

    model, clip = network(), text_encoder()
    values = {"MODEL": model, "CLIP": clip, "LATENT": latent(), "CONDITIONING": conditioning()}
    weights = ldm_layout.taesd_to_comfy(block_mean_autoencoder(0).state_dict(), torch.tensor(0.18), torch.tensor(0.0))
    values["VAE"] = comfy.sd.VAE(sd={key.removeprefix("first_stage_model."): each for key, each in weights.items()})
    values["SAMPLER"] = comfy.samplers.sampler_object("euler")
    assert {name: kind_of(value) for name, value in values.items()} == {name: name for name in values}
    said = {}
    for name, cls in N.items():
        declared = cls.INPUT_TYPES()
        for key, (kind, _) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            for found, value in values.items():
                if not isinstance(kind, list) and kind in values and found != kind:
                    said[f"{name} {key} {found}"] = _said(cls, {key: value})
                    assert f": {key} takes {kind}, and what came in is {found};" in said[f"{name} {key} {found}"], said
            if kind == "FLOAT":
                assert f": {key} must be a finite number, not nan" in _said(cls, {key: float("nan")})
    return {"refused": str(len(said)), **dict(list(said.items())[:3])}


def _said(cls: Any, inputs: dict[str, Any]) -> str:
    try:
        getattr(cls(), cls.FUNCTION)(**inputs)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{cls.__name__} took {inputs}")


def noisy() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))


def seeing(unet: Any, image: torch.Tensor | None, family: str = "SD15") -> torch.Tensor:
    """One call of a network on `noisy`, with an image behind it where there is one."""
    generator = torch.Generator().manual_seed(7)
    context = torch.randn(2, 77, CONTEXT[family], generator=generator)
    more = {"y": torch.randn(2, 2816, generator=generator)} if family == "SDXL" else {}
    x = noisy() if image is None else torch.cat([noisy(), image], dim=1)
    return unet(x, torch.tensor([10.0, 700.0]), context=context, transformer_options={}, **more).detach()


def depth_lora(
    model: Any, widening: str = "zeros", family: str = "SD15"
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, float]]:
    """A depth LoRA away from where it begins, its network's output, and how that differs from the original's."""
    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.training.adapters import trainable
    from diff2flow_nodes.training.layers import GROUPS, LoraSettings

    settings = LoraSettings(groups=GROUPS, rank=4, alpha=4.0, ends_in_full=True, widening=widening)
    image = torch.ones(2, 4, 8, 8)
    with torch.inference_mode(False), current().training(model) as backbone:
        plain = seeing(backbone.module, None, family)
        with trainable(backbone, settings, 0, inputs=8) as adapters:
            at_first = seeing(backbone.module, image.clone() if widening == "zeros" else noisy(), family)
            moved(adapters)
            trained = seeing(backbone.module, image.clone(), family)
            found = {"before training": difference(at_first, plain), "after": difference(trained, plain)}
            return adapters.state(), trained, found


def check_widening() -> dict[str, float]:
    """Before training the widened network is the original: with any image, or halved where both latents are equal.

    Afterwards it is what ComfyUI's own LoRA loader makes of the plain network and the file.
    """
    import comfy.model_management

    found = {}
    for family, v, widening in (("SD15", False, "zeros"), ("SD15", False, "halved"), ("SD20", True, "zeros"),
                                ("SDXL", False, "zeros"), ("SDXL", False, "halved")):  # fmt: skip
        model = network(family, v)
        state, trained, numbers = depth_lora(model, widening, family)
        tuned = comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0.0)[0]
        comfy.model_management.load_models_gpu([tuned], force_full_load=True)
        numbers["file"] = difference(seeing(tuned.model.diffusion_model, torch.ones(2, 4, 8, 8), family), trained)
        found |= {f"{family} {widening} {name}": value for name, value in numbers.items()}
        assert numbers["before training"] <= 1e-5 and numbers["file"] <= 2e-3 * numbers["after"], found
        assert numbers["after"] > 1e-3, found
    return found


def check_loras_beside_depth() -> dict[str, Any]:
    """While a depth LoRA's weights are on the shared network, other LoRAs still load, and nothing stays of it."""
    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.training.adapters import trainable
    from diff2flow_nodes.training.layers import LoraSettings

    host, model = current(), network()
    settings = LoraSettings(rank=4, alpha=4.0, ends_in_full=True)
    with torch.inference_mode(False), host.training(model) as backbone, trainable(backbone, settings, 0) as adapters:
        moved(adapters)
        ends = adapters.state()
    plain, tuned = ours(model), ours(host.apply_lora(model, None, ends, 1.0, None)[0])
    depth = host.apply_lora(model, None, depth_lora(model)[0], 1.0, {"diff2flow.task": "depth"})[0]
    seen = [
        [context, {**options, "concat_latent_image": torch.randn(2, 4, 8, 8)}] for context, options in conditioning()
    ]
    first = model.model.diffusion_model.input_blocks[0][0]
    known = host.fingerprint(model), host.fingerprint(depth)
    for _ in range(2):
        sampled = run_node("KSampler", depth, 7, 2, 1.0, "euler", "simple", seen, seen, latent())[0]["samples"]
        assert first.weight.shape[1] == 8 and sampled.isfinite().all()
        assert host.facts(depth).sees_image and host.facts(depth).in_channels == 8
        assert not host.facts(model).sees_image and host.facts(model).in_channels == 4
        assert (host.fingerprint(model), host.fingerprint(depth)) == known
        other = host.apply_lora(model, None, ends, 1.0, None)[0]
        assert first.weight.shape[1] == 8  # so it was loaded beside the widened weight
        assert torch.equal(ours(other), tuned) and torch.equal(ours(model), plain) and first.weight.shape[1] == 4
        assert model.model.concat_keys == ()
    said = refused(lambda: host.apply_lora(depth, None, ends, 1.0, None))
    assert "put this LoRA before that one" in said, said
    return {"effect": difference(tuned, plain), "refused": said}


def check_device_without_float64() -> dict[str, str]:
    """What a model is can be told on such a device."""
    from diff2flow_nodes.alignment import NoiseSchedule
    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.tests.pretended_device import PretendedDevice

    model = network()
    with PretendedDevice("mps", float64=False) as device:
        device.place(model.model.model_sampling)
        schedule = current().facts(model).schedule
    assert schedule == NoiseSchedule.scaled_linear()
    return {"schedule": schedule.describe()}


def check_conditioning_waits_for_nothing() -> dict[str, int]:
    """SDXL's vector is made on the CPU, where its parts are, and sent once."""
    from diff2flow_nodes.hosts import current
    from diff2flow_nodes.tests.pretended_device import PretendedDevice
    from diff2flow_nodes.training.conditioning import conditioned
    from diff2flow_nodes.training.dataset import Batch

    sizes = torch.tensor([[64, 80, 0, 8, 64, 64], [64, 64, 0, 0, 64, 64]])
    batch = Batch(torch.zeros(2, 4, 8, 8), torch.randn(2, 77, 2048), torch.randn(2, 1280), sizes)
    with current().training(network("SDXL")) as backbone:
        here = conditioned(backbone, batch)
        with PretendedDevice() as device, device.counted() as waits:
            backbone.device = device.device
            there = conditioned(backbone, batch)
            assert all(value.device == device.device for value in there.values())
    assert not waits, waits
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    return {name: value.shape[-1] for name, value in here.items()}


def main(found: dict[str, Any]) -> None:
    """Runs the checks among some globals, or those that the command line names, and prints what became of each."""
    checks = {name.removeprefix("check_"): check for name, check in found.items() if name.startswith("check_")}
    results = {}
    for name in arguments or checks:
        with torch.inference_mode():
            try:
                results[name] = {"ok": True, "found": checks[name]()}
            except Exception as error:  # reported to the test that started us
                results[name] = {"ok": False, "found": f"{type(error).__name__}: {error}"}
                if os.environ.get("DIFF2FLOW_TRACE"):
                    raise
    print("RESULTS " + json.dumps(results))


if __name__ == "__main__":
    main(dict(globals()))
