"""Writes a checkpoint's tensors as a folder of diffusers' pipelines.

This is the headless host's because it builds networks by diffusers' classes, as the loader of checkpoints does. It asks
for nothing else of that host: given tensors in Stable Diffusion's original layout (`hosts.port.Host.checkpoint`), it
does the same inside ComfyUI, if the package diffusers is installed there. The node imports it when it runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...alignment import NoiseSchedule
from ...samplers.parameterization import FlowParameterization
from ...training.checkpoint_file import StoredTensor
from ..port import HostError
from .autoencoder import PREFIX as VAE_PREFIX
from .autoencoder import read_autoencoder
from .checkpoint import build_unet
from .model import LATENT_SCALES
from .tokens import END, vocabulary
from .towers import Tower, read_towers
from .unet_layout import PREFIX, UnetLayout

_PIXELS = 8
"""Pixels a latent."""
_TOKENS = 77
_START_MARK, _END_MARK = "<|startoftext|>", "<|endoftext|>"
_TINY_SCALE = "vae_scale"
_TINY_SHIFT = "vae_shift"


@dataclass(frozen=True)
class Pipeline:
    """What is written.

    Args:
        tensors: of the checkpoint, in its original layout.
        merges: of CLIP's tokenizer.
        flow: how the network is sampled.
        dtype: of the written weights.
        size: side of the images that it makes unasked, pixels.
        name: for messages.
    """

    tensors: Mapping[str, StoredTensor]
    merges: Sequence[tuple[str, str]]
    flow: FlowParameterization
    dtype: torch.dtype
    size: int
    name: str


def write_pipeline(folder: Path, pipeline: Pipeline) -> None:
    """Fills an empty folder: model_index.json, unet, vae, text encoders, tokenizers, scheduler.

    Raises:
        HostError: networks that diffusers' pipelines cannot hold.
    """
    family = _write_unet(folder / "unet", pipeline)
    _write_autoencoder(folder / "vae", pipeline, family)
    towers = read_towers(_read(pipeline, ("cond_stage_model.", "conditioner.")), family, pipeline.name)
    if towers is None:
        raise HostError("clip: there is no text encoder; connect the CLIP of a full checkpoint")
    for place, tower in zip(("", "_2"), towers.children(), strict=False):
        _write_tower(folder / f"text_encoder{place}", tower, pipeline.dtype)
        _write_tokenizer(folder / f"tokenizer{place}", pipeline.merges, tower.kind.pad)
    scheduler_of(pipeline.flow).save_pretrained(folder / "scheduler")
    tiny = f"{VAE_PREFIX}taesd_decoder.1.weight" in pipeline.tensors
    _write_json(folder / "model_index.json", _index(family, "AutoencoderTiny" if tiny else "AutoencoderKL"))


def scheduler_of(flow: FlowParameterization) -> Any:
    """diffusers' scheduler whose steps are Euler's along the flow: EulerDiscreteScheduler.

    Euler in flow time t is Euler in sigma_k = (1 - t)/t, which is what that scheduler counts; with spacing "trailing"
    it begins at the schedule's last timestep, as "start = terminal" does. Its own steps are even in the network's
    timestep, not in t: hand it `flow.sigmas_k(steps)` as `sigmas` for the very same steps.
    """
    from diffusers import EulerDiscreteScheduler

    alignment = flow.alignment
    return EulerDiscreteScheduler(
        **_betas(alignment.schedule),
        num_train_timesteps=alignment.schedule.steps,
        prediction_type="v_prediction" if alignment.prediction == "v" else "epsilon",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def _betas(schedule: NoiseSchedule) -> dict[str, Any]:
    """Stable Diffusion's schedule by name, with or without zero terminal SNR; any other one by its betas."""
    standard = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    plain = NoiseSchedule.scaled_linear()
    for known, switch in ((plain, False), (plain.zero_terminal_snr(), True)):
        if schedule.steps == known.steps and torch.allclose(
            schedule.alphas_cumprod, known.alphas_cumprod, rtol=1e-4, atol=1e-6
        ):
            return standard | {"rescale_betas_zero_snr": switch}
    kept = schedule.alphas_cumprod
    return {"trained_betas": (1.0 - kept / torch.cat([torch.ones(1), kept[:-1]])).tolist()}


def _read(pipeline: Pipeline, prefixes: str | tuple[str, ...]) -> dict[str, Tensor]:
    wanted = {key: tensor for key, tensor in pipeline.tensors.items() if key.startswith(prefixes)}
    return {key: tensor.read().reshape(tensor.shape).cpu() for key, tensor in wanted.items()}


def _write_unet(folder: Path, pipeline: Pipeline) -> str:
    """Writes the UNet and returns its family."""
    unet = {key.removeprefix(PREFIX): value for key, value in _read(pipeline, PREFIX).items()}
    layout = UnetLayout(unet, pipeline.name)
    module = build_unet(unet, layout, pipeline.name, pipeline.dtype)
    module.register_to_config(sample_size=pipeline.size // _PIXELS, **_usual_depths(layout.config))
    module.save_pretrained(folder)
    return layout.family


def _usual_depths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Transformer layers as one number a level and blocks as one number, where they are: what others' tools expect."""
    down, up = config["transformer_layers_per_block"], config["reverse_transformer_layers_per_block"]
    usual: dict[str, Any] = {}
    levels = [set(a) | set(b) for a, b in zip(down, reversed(up), strict=True)]
    depths = [{depth for depth in level if depth} or {1} for level in levels]
    if all(len(level) == 1 for level in depths):
        listed = [level.pop() for level in depths]
        usual["transformer_layers_per_block"] = listed[0] if len(set(listed)) == 1 else listed
        usual["reverse_transformer_layers_per_block"] = None
    if len(set(config["layers_per_block"])) == 1:
        usual["layers_per_block"] = config["layers_per_block"][0]
    return usual


def _write_autoencoder(folder: Path, pipeline: Pipeline, family: str) -> None:
    state = _read(pipeline, VAE_PREFIX)
    found = read_autoencoder(state, pipeline.name, torch.device("cpu"))
    if found is None:
        raise HostError("vae: there is no autoencoder; connect the VAE of a full checkpoint")
    module: Any = found.module
    if f"{VAE_PREFIX}taesd_decoder.1.weight" in state:
        scaling = _tiny_scaling(state, family)
    else:
        scaling = {"scaling_factor": LATENT_SCALES[family], "force_upcast": family == "SDXL"}
    module.register_to_config(**scaling)
    nn.Module.to(module, pipeline.dtype, memory_format=torch.contiguous_format)
    module.save_pretrained(folder)


def _tiny_scaling(state: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """diffusers divides by one factor before it decodes; there is no place for a shift."""
    shift = float(state.get(VAE_PREFIX + _TINY_SHIFT, torch.zeros(())))
    if shift:
        raise HostError(
            f"vae: it is a tiny autoencoder whose latents are shifted by {shift:.3g}, which diffusers' pipelines cannot"
            " express; connect Stable Diffusion's own VAE, or a TAESD without shift"
        )
    return {"scaling_factor": LATENT_SCALES[family] / float(state.get(VAE_PREFIX + _TINY_SCALE, torch.ones(())))}


def _write_tower(folder: Path, tower: Tower, dtype: torch.dtype) -> None:
    """One text encoder, with the projection where that is read.

    Its configuration says float32 whatever the file holds: what diffusers loads a UNet in when it is not told a dtype.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config, names = tower.model.config, {}
    for name, value in tower.model.state_dict().items():
        names[f"text_model.{name.removeprefix('text_model.')}"] = value.to(dtype).contiguous()
    if tower.kind.normed and tower.layer < config.num_hidden_layers:
        names = {name: value for name, value in names.items() if not name.startswith(_layers_after(tower))}
        config.num_hidden_layers = tower.layer
    kind = CLIPTextModelWithProjection if tower.kind.projected else CLIPTextModel
    if tower.kind.projected:
        names["text_projection.weight"] = tower.projection.weight.detach().to(dtype).contiguous()
        config.projection_dim = tower.projection.weight.shape[0]
    config.architectures = [kind.__name__]
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config.to_diff_dict() | {"dtype": "float32"})
    _write_weights(folder / "model.safetensors", names)


def _layers_after(tower: Tower) -> tuple[str, ...]:
    """What the names of layers begin with that the context does not go through (SD2)."""
    layers = range(tower.layer, tower.model.config.num_hidden_layers)
    return tuple(f"text_model.encoder.layers.{number}." for number in layers)


def _write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    kept = {name: value.clone() for name, value in state.items() if not name.endswith("position_ids")}
    save_file(kept, str(path), {"format": "pt"})


def _write_tokenizer(folder: Path, merges: Sequence[tuple[str, str]], pad: int) -> None:
    words = vocabulary(merges)
    mark = _END_MARK if pad == END else next(word for word, number in words.items() if number == pad)
    special = {"bos_token": _START_MARK, "eos_token": _END_MARK, "unk_token": _END_MARK, "pad_token": mark}
    folder.mkdir(parents=True)
    _write_json(folder / "vocab.json", words)
    rules = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + rules, encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    more = {"model_max_length": _TOKENS, "do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **special, **more})


def _index(family: str, autoencoder: str) -> dict[str, Any]:
    from diffusers import __version__

    parts: dict[str, Any] = {
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", autoencoder],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    if family != "SDXL":
        unchecked = {"safety_checker": [None, None], "requires_safety_checker": False}
        return {"_class_name": "StableDiffusionPipeline", **parts, **unchecked}
    second = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": False,
    }
    return {"_class_name": "StableDiffusionXLPipeline", **parts, **second}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
