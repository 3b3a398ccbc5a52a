"""What a LoRA file says of itself: modelspec (sai_model_spec 1.0.0), kohya's ss_*, and diff2flow.*."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from .buckets import Size
from .layers import LoraSettings
from .objective import Objective
from .port import Backbone, TrainingDataset
from .settings import TrainSettings

VERSION = "1"
"""Of the diff2flow.* keys."""

_ARCHITECTURES = {
    ("SD1", "eps"): ("stable-diffusion-v1", "sd_v1"),
    ("SD1", "v"): ("stable-diffusion-v1", "sd_v1"),
    ("SD1", "x0"): ("stable-diffusion-v1", "sd_v1"),
    ("SD2", "eps"): ("stable-diffusion-v2-512", "sd_v2"),
    ("SD2", "v"): ("stable-diffusion-v2-768-v", "sd_v2_v"),
    ("SD2", "x0"): ("stable-diffusion-v2-512", "sd_v2"),
    ("SDXL", "eps"): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    ("SDXL", "v"): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    ("SDXL", "x0"): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
_PREDICTIONS = {"eps": "epsilon", "v": "v", "x0": "x0"}
_LORA = "/lora"
"""What modelspec adds to the architecture of a LoRA."""
_TAGS = 1000


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run, for its metadata.

    Args:
        title: of the LoRA.
        backbone, dataset, lora, settings: what was trained, on what, and how.
        steps: really done.
        trained: number of trained parameters.
        share: of all parameters of the networks.
        recommended_steps, recommended_cfg: what the user should sample with.
        began: when the run began, seconds since 1970.
    """

    title: str
    backbone: Backbone
    dataset: TrainingDataset
    lora: LoraSettings
    settings: TrainSettings
    steps: int
    trained: int
    recommended_steps: int
    recommended_cfg: float
    began: float
    share: float = 0.0


def checkpoint_metadata(run: Run) -> dict[str, str]:
    """All metadata of a run's checkpoint (preset full), as strings."""
    architecture, _ = _architecture(run.backbone)
    return {**_modelspec(run), "modelspec.architecture": architecture, **_diff2flow(run)}


def lora_metadata(run: Run) -> dict[str, str]:
    """All metadata of a run's LoRA, as strings."""
    return {**_modelspec(run), **_kohya(run), **_kohya_dataset(run), **_diff2flow(run)}


def baked_metadata(
    loras: Sequence[Mapping[str, str]],
    title: str,
    family: str,
    prediction: str,
    start: str,
    zero_terminal_snr: bool,
) -> dict[str, str]:
    """All metadata of a checkpoint that LoRAs were baked into: what the last of them says, but for what differs.

    Args:
        loras: metadata of what was applied, in that order; the first may be that of a trained base checkpoint.
        title: of the checkpoint.
        family, prediction: of its network.
        start, zero_terminal_snr: how it is sampled now.
    """
    last = loras[-1]
    kept = {key: value for key, value in last.items() if key.startswith("diff2flow.")}
    merged = [lora["modelspec.title"] for lora in loras if lora.get("modelspec.title")]
    steps, cfg = last.get("diff2flow.recommended_steps", ""), last.get("diff2flow.recommended_cfg", "")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[family, prediction][0],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": last.get("modelspec.resolution", ""),
        "modelspec.prediction_type": _PREDICTIONS[prediction],
        "modelspec.merged_from": ", ".join(merged),
        "modelspec.usage_hint": f"{steps} steps, CFG {cfg}" if steps and cfg else "",
        **kept,
        "diff2flow.version": last.get("diff2flow.version", VERSION),
        "diff2flow.prediction": prediction,
        "diff2flow.zero_terminal_snr": str(zero_terminal_snr).lower(),
        "diff2flow.start": start,
        "diff2flow.baked": json.dumps([_origin(lora) for lora in loras if is_lora(lora)]),
    }


def is_lora(metadata: Mapping[str, str]) -> bool:
    """Whether metadata is that of a LoRA, not of a checkpoint that was trained or baked."""
    return metadata.get("modelspec.architecture", "").endswith(_LORA)


def _origin(lora: Mapping[str, str]) -> dict[str, str]:
    """Name and hash of a LoRA that was baked in."""
    return {"title": lora.get("modelspec.title", ""), "hash": lora.get("sshs_model_hash", "")}


def _modelspec(run: Run) -> dict[str, str]:
    architecture, _ = _architecture(run.backbone)
    width, height = run.dataset.nominal_size
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + _LORA,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": run.title,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": _PREDICTIONS[run.backbone.prediction],
        "modelspec.usage_hint": f"{run.recommended_steps} steps, CFG {run.recommended_cfg:g}",
    }


def _kohya(run: Run) -> dict[str, str]:
    settings, lora, moved = run.settings, run.lora, run.settings.optimizer
    _, base = _architecture(run.backbone)
    rank = "Dynamic" if lora.rank_ratio else str(lora.rank)
    alpha = _alpha(lora)
    arguments = {"conv_dim": rank, "conv_alpha": alpha} if "conv" in lora.groups else {}
    if lora.dora:
        arguments["dora_wd"] = "True"
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": base,
        "ss_v2": str(run.backbone.family == "SD2"),
        "ss_output_name": run.title,
        **_kohya_base(run.backbone),
        "ss_learning_rate": str(settings.learning_rate),
        "ss_unet_lr": str(settings.learning_rate),
        "ss_text_encoder_lr": str(settings.learning_rate * moved.text_rate) if lora.text_encoder else "None",
        "ss_optimizer": f"{moved.name}(weight_decay={moved.weight_decay},betas=({moved.beta1}, {moved.beta2}))",
        "ss_lr_scheduler": moved.schedule,
        "ss_lr_warmup_steps": str(moved.warmup_steps),
        "ss_max_grad_norm": str(moved.max_grad_norm),
        "ss_gradient_accumulation_steps": str(moved.accumulation),
        "ss_gradient_checkpointing": str(moved.checkpointing),
        "ss_caption_dropout_rate": str(settings.objective.caption_dropout),
        "ss_mixed_precision": moved.precision,
        "ss_max_train_steps": str(settings.steps),
        "ss_steps": str(run.steps),
        "ss_seed": str(settings.seed),
        "ss_training_started_at": str(run.began),
        "ss_training_finished_at": str(datetime.now(timezone.utc).timestamp()),
    }


def _kohya_base(backbone: Backbone) -> dict[str, str]:
    """Name and hashes of the base; nothing where it is unknown."""
    if not backbone.base_name:
        return {}
    whole = backbone.base_hash
    return {"ss_sd_model_name": backbone.base_name, "ss_new_sd_model_hash": whole, "ss_sd_model_hash": whole[:10]}


def _known_base(backbone: Backbone) -> dict[str, str]:
    if not backbone.base_name:
        return {}
    return {"diff2flow.base_name": backbone.base_name, "diff2flow.base_hash": backbone.base_hash}


def _kohya_dataset(run: Run) -> dict[str, str]:
    dataset, size = run.dataset, run.settings.batch_size
    counts = dataset.bucket_counts
    batches = sum(math.ceil(count / size) for count in counts.values())
    return {
        "ss_num_train_images": str(sum(counts.values())),
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": str(batches),
        "ss_num_epochs": str(math.ceil(run.steps / batches)),
        "ss_epoch": str(math.ceil(run.steps / batches)),
        "ss_batch_size_per_device": str(size),
        "ss_total_batch_size": str(size),
        "ss_resolution": str(dataset.nominal_size),
        "ss_enable_bucket": str(len(counts) > 1),
        "ss_bucket_info": json.dumps(_bucket_info(counts)),
        "ss_flip_aug": str(dataset.mirrored),
        **_kohya_folders(dataset),
    }


def _bucket_info(counts: dict[Size, int]) -> dict[str, object]:
    """kohya's: the sizes with how many images an epoch has of each, repeats counted."""
    buckets = {str(i): {"resolution": list(size), "count": count} for i, (size, count) in enumerate(counts.items())}
    return {"buckets": buckets}


def _kohya_folders(dataset: TrainingDataset) -> dict[str, str]:
    """Repeats, images and tags of each folder."""
    sources = dataset.sources
    folders = {name: {"n_repeats": source.repeats, "img_count": source.count} for name, source in sources.items()}
    tags = {name: dict(source.tags.most_common(_TAGS)) for name, source in sources.items()}
    return {"ss_dataset_dirs": json.dumps(folders), "ss_tag_frequency": json.dumps(tags)}


def _diff2flow(run: Run) -> dict[str, str]:
    objective = Objective(run.settings.objective, run.backbone.schedule, run.backbone.prediction)
    schedule = objective.schedule
    goal = run.settings.objective
    first, last = objective.t_span
    return {
        "diff2flow.version": VERSION,
        "diff2flow.task": "depth" if run.dataset.image_channels else "text_to_image",
        "diff2flow.objective": goal.name,
        "diff2flow.weighting": goal.weighting if goal.name == "diff2flow" else "native",
        "diff2flow.time_distribution": goal.time_distribution,
        "diff2flow.loss": goal.loss,
        "diff2flow.pairing": "own noise" if run.dataset.has_noise else goal.pairing,
        "diff2flow.recipe": json.dumps(asdict(goal.reflow)),
        "diff2flow.prediction": run.backbone.prediction,
        "diff2flow.schedule": schedule.describe(),
        "diff2flow.zero_terminal_snr": str(schedule.is_zero_terminal_snr).lower(),
        "diff2flow.start": objective.start,
        "diff2flow.t_range": f"{first:.7g},{last:.7g}",
        "diff2flow.recommended_steps": str(run.recommended_steps),
        "diff2flow.recommended_cfg": f"{run.recommended_cfg:g}",
        "diff2flow.base_family": run.backbone.family,
        **_known_base(run.backbone),
        "diff2flow.dataset": run.dataset.summary(),
        "diff2flow.lora": json.dumps(asdict(run.lora)),
        "diff2flow.trained_parameters": str(run.trained),
        "diff2flow.trained_share": f"{run.share:.6g}",
    }


def _alpha(lora: LoraSettings) -> str:
    """alpha as the file holds it, where all layers have the same."""
    if lora.rank_ratio and (lora.rslora or not lora.alpha):
        return "Dynamic"
    alpha = lora.alpha or lora.rank
    return f"{alpha * math.sqrt(lora.rank) if lora.rslora else alpha:g}"


def _architecture(backbone: Backbone) -> tuple[str, str]:
    """modelspec's and kohya's names of the base model."""
    return _ARCHITECTURES[backbone.family, backbone.prediction]
