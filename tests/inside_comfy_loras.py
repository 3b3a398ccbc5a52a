"""Checks inside ComfyUI's own process that a model is sampled as it was trained, whatever loaded it in which order.

Run as `inside_comfy.py` is.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from inside_comfy import (  # fmt: skip
    conditioning,
    difference,
    kohya_lora,
    latent,
    main,
    network,
    ours,
    refused,
    run_node,
    stock_custom,
    text_encoder,
)

# isort: split
import comfy.model_base
import comfy.model_sampling
import comfy.sd
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_model_merging as merging
import folder_paths
import torch
from safetensors.torch import load_file, save_file

from diff2flow_nodes.alignment import NoiseSchedule
from diff2flow_nodes.hosts import choice, current

SAYS = {
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "diff2flow.version": "1",
    "diff2flow.objective": "diff2flow",
    "diff2flow.start": "terminal",
    "diff2flow.prediction": "eps",
    "diff2flow.zero_terminal_snr": "false",
}
NOISE = {**SAYS, "modelspec.title": "noise", "diff2flow.start": "noise"}
NAIVE = {**SAYS, "modelspec.title": "naive", "diff2flow.objective": "flow_matching", "diff2flow.start": "noise"}
AUTO = ("auto", "auto", "auto", 1.0)


@contextmanager
def folders() -> Iterator[Path]:
    """ComfyUI's folders of LoRAs and checkpoints and its output, empty, in a temporary place."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kinds = {}
        for kind in ("loras", "checkpoints"):
            (place / kind).mkdir()
            kinds[kind] = ([str(place / kind)], {".safetensors"})
        own = patch.dict(folder_paths.folder_names_and_paths, kinds)
        with own, patch.object(folder_paths, "output_directory", str(place)):
            folder_paths.filename_list_cache.clear()
            yield place
        folder_paths.filename_list_cache.clear()


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the pack logs meanwhile, as if it had said nothing before."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(choice.__name__)
    getattr(choice, "say_once", None) and choice.say_once.cache_clear()
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def with_lora(model: Any, loader: str, name: str, strength: float = 1.0) -> Any:
    if loader == "LoraLoader":
        return run_node(loader, model, None, name, strength, strength)[0]
    return run_node(loader, model, name, strength)[0]


def ksampler(model: Any) -> torch.Tensor:
    texts = (conditioning(), conditioning(seed=2))
    return run_node("KSampler", model, 7, 4, 4.0, "euler", "simple", *texts, latent())[0]["samples"]


WAYS: dict[str, Callable[[Any], torch.Tensor]] = {
    "KSampler": ksampler,
    "Diff2FlowSampler": lambda model: ours(model, steps=4),
    "SamplerCustom": lambda model: stock_custom(model, steps=4),
}
LOADERS = ("Diff2FlowLoraLoader", "LoraLoader", "LoraLoaderModelOnly")


def check_order_of_lora_and_flow_model() -> dict[str, float]:
    """A LoRA behind Diff2Flow Model is sampled as one in front of it, by every loader and every sampler."""
    model, found = network(), {}
    with folders() as place:
        for name, says in (("noise", NOISE), ("naive", NAIVE)):
            lora = f"{name}.safetensors"
            save_file(kohya_lora(model, 1), place / "loras" / lora, says)
            front = run_node("Diff2FlowModel", with_lora(model, LOADERS[0], lora), *AUTO)[0]
            plain = run_node("Diff2FlowModel", model, *AUTO)[0]
            for way, sample in WAYS.items():
                wanted = sample(front)
                for loader in LOADERS:
                    behind = sample(with_lora(plain, loader, lora))
                    before = sample(run_node("Diff2FlowModel", with_lora(model, loader, lora), *AUTO)[0])
                    found[f"{name} {loader} {way}"] = max(difference(behind, wanted), difference(before, wanted))
                    assert sample(plain).isfinite().all()
        sigma = run_node("Diff2FlowSigmas", with_lora(plain, "LoraLoader", "noise.safetensors"), 4, "uniform", 1.0)[0]
        assert float(sigma[0]) == 1.0, sigma
        untouched = run_node("Diff2FlowSigmas", plain, 4, "uniform", 1.0)[0]
        assert abs(float(untouched[0]) - (1 - 0.0640425)) < 1e-6, untouched
    assert max(found.values()) <= 1e-6, found
    return found


def check_what_the_user_chose_stays() -> dict[str, float]:
    """Start, shift and prediction of Diff2Flow Model hold for LoRAs behind it; clones do not change each other."""
    model = network()
    with folders() as place:
        save_file(kohya_lora(model, 1), place / "loras" / "noise.safetensors", NOISE)
        chosen = run_node("Diff2FlowModel", model, "v", "auto", "terminal", 3.0)[0]
        behind = with_lora(chosen, "LoraLoaderModelOnly", "noise.safetensors")
        facts = current().facts(behind)
        assert (facts.flow.start, facts.flow.shift, facts.prediction) == ("terminal", 3.0, "v"), facts
        auto = run_node("Diff2FlowModel", model, *AUTO)[0]
        first, second = (with_lora(auto, "LoraLoaderModelOnly", "noise.safetensors", s) for s in (1.0, 0.0))
        starts = [current().facts(each).flow.start for each in (auto, first, second, first.clone(), auto.clone())]
        again = run_node("Diff2FlowModel", chosen, *AUTO)[0]
        assert current().facts(again).prediction == "v"
        sampling = first.get_model_object("model_sampling")
        rebuilt = type(sampling)(model.model.model_config)
        rebuilt.set_parameters(shift=2.0, multiplier=sampling.multiplier)
        assert (rebuilt.diff2flow.start, rebuilt.diff2flow.shift) == ("noise", 2.0)
    assert starts == ["terminal", "noise", "terminal", "noise", "terminal"], starts
    return {"starts": len(starts)}


def check_which_loras_count() -> dict[str, Any]:
    """Every LoRA on the model counts, an ordinary one behind it hides nothing, and one that is unknown is told."""
    model, host = network(), current()
    with folders() as place, logged() as said:
        files = {"noise": NOISE, "naive": NAIVE, "kohya": {"ss_network_dim": "2"}, "bare": None}
        for seed, (name, says) in enumerate(files.items()):
            save_file(kohya_lora(model, seed), place / "loras" / f"{name}.safetensors", says)

        def titles(*names: str, loader: str = "LoraLoader", strength: float = 1.0) -> list[str]:
            loaded = model
            for name in names:
                loaded = with_lora(loaded, loader, f"{name}.safetensors", strength)
            return [lora["modelspec.title"] for lora in host.facts(loaded).loras if "modelspec.title" in lora]

        for loader in LOADERS:
            assert titles("noise", "kohya", "bare", loader=loader) == ["noise"], loader
            assert titles("bare", "naive", loader=loader) == ["naive"], loader
            assert titles("noise", loader=loader, strength=0.0) == [], loader
        assert titles("kohya") == [] and not said, said
        ordinary = with_lora(with_lora(model, LOADERS[0], "naive.safetensors"), LOADERS[0], "kohya.safetensors")
        assert type(choice.choose_flow(host.facts(ordinary)).alignment).__name__ == "NaiveFlow"
        mixed = titles("naive", "noise")
        assert mixed == ["naive", "noise"]
        both = with_lora(with_lora(model, "LoraLoader", "naive.safetensors"), "LoraLoader", "noise.safetensors")
        choice.choose_flow(host.facts(both))
        assert len(said) == 1 and "'naive'" in said[0] and "'noise'" in said[0], said
        stranger = comfy.sd.load_lora_for_models(model, None, kohya_lora(model, 99), 1.0, 1.0)[0]
        host.facts(stranger), host.facts(stranger)
        assert len(said) == 2 and "load it by Diff2Flow LoRA Loader" in said[1], said
        unmatched = comfy.sd.load_lora_for_models(model, None, load_file(place / "loras/noise.safetensors"), 0.5, 1.0)
        assert [lora["modelspec.title"] for lora in host.facts(unmatched[0]).loras] == ["noise"]
    return {"said": said}


def v_model(zero_terminal_snr: bool = False) -> Any:
    """A small SD1.x network behind ModelSamplingDiscrete v_prediction."""
    return advanced.ModelSamplingDiscrete().patch(network(v=True), "v_prediction", zero_terminal_snr)[0]


def check_zero_terminal_snr() -> dict[str, float]:
    """A v model rescaled to zero terminal SNR is sampled from pure noise, and trained on that schedule."""
    eps_model, found = network(v=True), {}
    [model] = advanced.ModelSamplingDiscrete().patch(eps_model, "v_prediction", True)
    facts = current().facts(model)
    exact = NoiseSchedule.scaled_linear().zero_terminal_snr()
    assert facts.schedule.is_zero_terminal_snr and facts.prediction == "v"
    assert facts.schedule == exact
    flow = run_node("Diff2FlowModel", model, *AUTO)[0]
    sigmas = run_node("Diff2FlowSigmas", model, 4, "uniform", 1.0)[0]
    largest = model.get_model_object("model_sampling").sigma_max
    assert sigmas.isfinite().all() and abs(float(sigmas[0] / largest) - 1) < 1e-5, sigmas
    found["KSampler"] = difference(ours(model, steps=4), ksampler(flow))
    found["stock"] = difference(ours(model, steps=4), stock_custom(model, steps=4))
    drawn = ours(model, steps=4)
    assert drawn.isfinite().all() and 0.1 < float(drawn.std()) < 10.0, drawn.std()
    with current().training(model) as backbone:
        assert backbone.schedule == facts.schedule and backbone.prediction == "v"
    said = refused(lambda: ours(advanced.ModelSamplingDiscrete().patch(eps_model, "eps", True)[0]))
    assert "zero-terminal-SNR" in said and "v" in said, said
    assert found["KSampler"] <= 1e-6 and found["stock"] < 0.05, found
    return found


def full_checkpoint(place: Path, name: str, markers: tuple[str, ...] = (), **metadata: str) -> str:
    """A checkpoint that ComfyUI loads as SD1.x, of one level, in half precision, other weights for every name."""
    path = place / "checkpoints" / f"{name}.safetensors"
    if not (place / "unmarked").exists():
        config = comfy.supported_models.SD15(UNET)
        config.unet_config["num_heads"], config.unet_config["num_head_channels"] = 8, -1
        config.set_inference_dtype(torch.float16, None)
        torch.manual_seed(0)
        model = comfy.model_base.BaseModel(config)
        for parameter in model.parameters():
            scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.data = (torch.randn(parameter.shape) * scale).to(parameter.dtype)
        text = config.process_clip_state_dict_for_saving(text_encoder(12, torch.float16).patcher.model.state_dict())
        unet = config.process_unet_state_dict_for_saving(model.diffusion_model.state_dict())
        save_file({key: value.clone() for key, value in {**unet, **text}.items()}, place / "unmarked")
    state = load_file(place / "unmarked")
    state["model.diffusion_model.out.2.bias"] += sum(name.encode()) / 1000
    save_file({**state, **{marker: torch.zeros(0) for marker in markers}}, path, metadata or None)
    folder_paths.filename_list_cache.clear()
    return path.name


UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1],
    "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1], "transformer_depth_middle": 1,
    "context_dim": 768, "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False,
    "dtype": torch.float16, "use_temporal_attention": False, "adm_in_channels": None,
}  # fmt: skip


def loaded(name: str, loader: str = "Diff2FlowCheckpointLoader") -> Any:
    more = ("None", 1.0) if loader.startswith("Diff2Flow") else ()
    return run_node(loader, name, *more)


def check_v_marks_of_sd1() -> dict[str, Any]:
    """An SD1.x file marked as v is v in both loaders, comes out of ComfyUI's Save Checkpoint as v, and reloads as v."""
    found = {}
    with folders() as place, logged() as said:
        plain = full_checkpoint(place, "plain")
        for name, markers in (("v", ("v_pred",)), ("vz", ("v_pred", "ztsnr")), ("z", ("ztsnr",))):
            file = full_checkpoint(place, name, markers)
            wanted = ("v" if "v_pred" in markers else "eps", name == "vz")
            model, clip, _ = loaded(file)
            stock = loaded(file, "CheckpointLoaderSimple")[0]
            for each in (model, stock):
                facts = current().facts(each)
                assert (facts.prediction, facts.schedule.is_zero_terminal_snr) == wanted, (name, facts)
            sampling = model.get_model_object("model_sampling")
            assert isinstance(sampling, comfy.model_sampling.V_PREDICTION) == (wanted[0] == "v"), name
            assert sampling.zsnr == wanted[1], name
            merging.save_checkpoint(model, clip, filename_prefix=f"checkpoints/again_{name}", output_dir=str(place))
            [again] = (place / "checkpoints").glob(f"again_{name}*")
            folder_paths.filename_list_cache.clear()
            facts = current().facts(loaded(again.name)[0])
            assert (facts.prediction, facts.schedule.is_zero_terminal_snr) == wanted, (name, facts)
            if getattr(model, "cached_patcher_init", None) is not None:
                fresh = model.clone(force_deepcopy=True)
                again_v = isinstance(fresh.model.model_sampling, comfy.model_sampling.V_PREDICTION)
                assert again_v == (wanted[0] == "v"), name
            found[name] = facts.prediction
        assert current().facts(loaded(plain)[0]).prediction == "eps"
        assert current().facts(loaded(plain, "CheckpointLoaderSimple")[0]).prediction == "eps"
        by_metadata = full_checkpoint(place, "metadata", **{"modelspec.predict_key": "v"})
        assert current().facts(loaded(by_metadata)[0]).prediction == "v"
    assert any("Diff2Flow Checkpoint Loader" in each and "ModelSamplingDiscrete" in each for each in said), said
    return found


def check_v_of_a_node_when_saved() -> dict[str, Any]:
    """Diff2Flow Save Checkpoint keeps the v prediction of a node; ComfyUI's forgets it, and its file is told so."""
    with folders() as place, logged() as said:
        model, clip, _ = loaded(full_checkpoint(place, "plain"))
        found = {}
        for dark in (False, True):
            lora = kohya_lora(model, 1 + dark)
            save_file(lora, place / "loras" / "vee.safetensors", {**SAYS, "diff2flow.prediction": "v"})
            by_node = advanced.ModelSamplingDiscrete().patch(model, "v_prediction", dark)[0]
            shared = with_lora(by_node, "LoraLoaderModelOnly", "vee.safetensors")
            without = type("VAE", (), {"get_sd": lambda self: {}})()
            [name] = run_node("Diff2FlowSaveCheckpoint", shared, clip, without, f"ours_{dark}", "fp16")
            folder_paths.filename_list_cache.clear()
            for loader in ("Diff2FlowCheckpointLoader", "CheckpointLoaderSimple"):
                facts = current().facts(loaded(name, loader)[0])
                found[f"{loader} {dark}"] = facts.prediction
                assert facts.schedule.is_zero_terminal_snr == dark, (loader, dark)
        assert not any("was saved by ComfyUI" in each for each in said), said
        prompt = {
            "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "plain.safetensors"}},
            "2": {"class_type": "ModelSamplingDiscrete", "inputs": {"model": ["1", 0], "sampling": "v_prediction"}},
            "3": {"class_type": "CheckpointSave", "inputs": {"model": ["2", 0]}},
        }
        where = {"filename_prefix": "checkpoints/theirs", "output_dir": str(place), "prompt": prompt}
        merging.save_checkpoint(by_node, clip, **where)
        [theirs] = (place / "checkpoints").glob("theirs*")
        folder_paths.filename_list_cache.clear()
        for loader in ("Diff2FlowCheckpointLoader", "CheckpointLoaderSimple"):
            choice.say_once.cache_clear()
            assert current().facts(loaded(theirs.name, loader)[0]).prediction == "eps"
        told = [each for each in said if "was saved by ComfyUI" in each]
        assert len(told) == 2 and all(theirs.name in each for each in told), said
    assert set(found.values()) == {"v"}, found
    return {**found, "said": told[0]}


def check_bypassed_lora() -> dict[str, Any]:
    """A LoRA that newer versions run beside the weights cannot be told: the log says what to do."""
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        return {"versions": "newer only"}
    model = network()
    with folders(), logged() as said:
        bypassed = comfy.sd.load_bypass_lora_for_models(model, None, kohya_lora(model, 1), 1.0, 0.0)[0]
        assert current().facts(bypassed).loras == () and current().facts(model).loras == ()
        assert len(said) == 1 and "Diff2Flow LoRA Loader" in said[0], said
    return {"said": said[0]}


def check_trained_checkpoint_by_the_stock_loader() -> dict[str, str]:
    """What Diff2Flow wrote into a checkpoint is read behind Load Checkpoint, too."""
    with folders() as place:
        file = full_checkpoint(place, "baked", **{**NOISE, "modelspec.architecture": "stable-diffusion-v1"})
        starts = [choice.flow_of(current().facts(loaded(file, loader)[0])).start for loader in
                  ("Diff2FlowCheckpointLoader", "CheckpointLoaderSimple")]  # fmt: skip
    assert starts == ["noise", "noise"], starts
    return {"start": starts[1]}


def check_prediction_of_a_lora() -> dict[str, Any]:
    """A LoRA trained on its own base as v makes it v; on another model the log names both; a node's word stands."""
    says = {**SAYS, "modelspec.title": "vee", "diff2flow.prediction": "v", "diff2flow.base_name": "mine.safetensors"}
    with folders() as place, logged() as said:
        mine, other = (full_checkpoint(place, name) for name in ("mine", "other"))
        model = loaded(mine)[0]
        save_file(kohya_lora(model, 1), place / "loras" / "vee.safetensors", says)
        dark = {**says, "diff2flow.zero_terminal_snr": "true"}
        save_file(kohya_lora(model, 2), place / "loras" / "dark.safetensors", dark)
        for loader in LOADERS:
            assert current().facts(with_lora(model, loader, "vee.safetensors")).prediction == "v", loader
        flow = choice.flow_of(current().facts(with_lora(model, LOADERS[0], "dark.safetensors")))
        assert flow.alignment.prediction == "v" and flow.alignment.schedule.is_zero_terminal_snr
        assert not said, said
        strange = loaded(other)[0]
        assert current().facts(with_lora(strange, "LoraLoader", "vee.safetensors")).prediction == "eps"
        assert len(said) == 1 and "'vee'" in said[0] and "mine.safetensors" in said[0] and "eps" in said[0], said
        refusal = refused(lambda: run_node("Diff2FlowModel", with_lora(strange, LOADERS[0], "dark.safetensors"), *AUTO))
        assert "'vee'" in refusal and "ModelSamplingDiscrete" in refusal, refusal
        by_node = advanced.ModelSamplingDiscrete().patch(model, "eps", False)[0]
        assert current().facts(with_lora(by_node, "LoraLoader", "vee.safetensors")).prediction == "eps"
    return {"said": said[0], "refused": refusal}


if __name__ == "__main__":
    main(dict(globals()))
