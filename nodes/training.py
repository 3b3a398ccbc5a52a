"""The node that trains."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..training.finetune import DTYPES, LoraOutput, finetune
from ..training.layers import LoraSettings
from ..training.objective import OBJECTIVES, T_RANGES, WEIGHTINGS, ObjectiveSettings
from ..training.plot import loss_plot
from ..training.settings import PRECISIONS, TrainSettings
from .errors import names_node

CATEGORY = "Diff2Flow/training"


class Diff2FlowTrain:
    """Trains a LoRA and hands on the model with it."""

    CATEGORY = CATEGORY
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("MODEL", "STRING", "IMAGE")
    RETURN_NAMES = ("model", "lora_name", "loss_plot")
    OUTPUT_TOOLTIPS = (
        "The model with the trained LoRA at strength 1, the very weights that were saved.",
        "Name of the saved LoRA in the folder 'loras'.",
        "The loss of every step, and its running mean.",
    )
    DESCRIPTION = (
        "Finetunes a Stable Diffusion model with a LoRA on the Diff2Flow loss: the model keeps its own time and scale,"
        " the loss is that of flow matching. Cancel, an error or a full memory saves the LoRA as far as it has come."
        " An existing LoRA is never overwritten: the new one gets a number (name_00002)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": _train_inputs(), "optional": _more_train_inputs()}

    @classmethod
    def VALIDATE_INPUTS(cls, output_name: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return output_name is None or bool(LoraOutput(current().folder("loras"), output_name))
        except ValueError as error:
            return str(error)

    @names_node("Diff2Flow Train")
    def train(
        self,
        model: Any,
        dataset: Any,
        lora: LoraSettings,
        objective: str,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        output_name: str,
        t_range: str = "native",
        weighting: str = "clamped",
        warmup_steps: int = 0,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        precision: str = "auto",
        save_dtype: str = "fp16",
        recommended_steps: int = 25,
        recommended_cfg: float = 7.0,
    ) -> tuple[Any, str, Any]:
        host = current()
        goal = ObjectiveSettings(objective, t_range, weighting)
        optimizer = (warmup_steps, weight_decay, max_grad_norm, precision)
        settings = TrainSettings(steps, batch_size, learning_rate, seed, goal, *optimizer)
        output = LoraOutput(host.folder("loras"), output_name, save_dtype, recommended_steps, recommended_cfg)
        host.facts(model)
        with host.training(model) as backbone:
            result = finetune(
                backbone, dataset, lora, settings, output, host.progress(steps, f"Training {output_name}")
            )
        trained, _ = host.apply_lora(model, None, result.state, 1.0, result.metadata)
        return trained, result.name, loss_plot(result.losses, result.name)


def _train_inputs() -> dict[str, Any]:
    return {
        "model": ("MODEL", {"tooltip": "The Stable Diffusion 1.x, 2.x or SDXL model to finetune, from a checkpoint."}),
        "dataset": (
            "D2F_DATASET",
            {"tooltip": "From Diff2Flow Image Dataset, made with the same checkpoint's VAE and CLIP."},
        ),
        "lora": ("D2F_LORA", {"tooltip": "From Diff2Flow LoRA Config: which layers are trained."}),
        "objective": (
            list(OBJECTIVES),
            {
                "default": "diff2flow",
                "tooltip": "What is minimised. diff2flow: the flow matching loss through the aligned network."
                " diffusion: the checkpoint's own eps or v loss, for comparison.",
            },
        ),
        "steps": (
            "INT",
            {
                "default": 1000,
                "min": 1,
                "max": 10_000_000,
                "tooltip": "Optimizer steps. 500 to 3000 for a style or subject, about 50 to 100 per image at batch 1.",
            },
        ),
        "batch_size": (
            "INT",
            {
                "default": 1,
                "min": 1,
                "max": 4096,
                "tooltip": "Images a step, in one call of the network, each with its own caption and time. 1 fits"
                " SD1.x at 512 px into 8 GB; 4 or more trains more steadily where memory allows.",
            },
        ),
        "learning_rate": (
            "FLOAT",
            {
                "default": 1e-4,
                "min": 1e-9,
                "max": 1.0,
                "step": 1e-6,
                "round": False,
                "tooltip": "Learning rate of AdamW, without unit. 1e-4 for a LoRA at alpha = rank; 2e-5 to 5e-5 for the"
                " paper's presets; lower it if the loss jumps.",
            },
        ),
        "seed": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 0xFFFFFFFFFFFFFFFF,
                "control_after_generate": False,
                "tooltip": "Seed of order, noise, times and the LoRA's first weights. On the CPU the same seed trains"
                " the same LoRA to the bit.",
            },
        ),
        "output_name": (
            "STRING",
            {
                "default": "my_lora",
                "tooltip": "Name of the LoRA in the folder 'loras', without ending; subfolders are allowed"
                " ('styles/ink'). Where it exists, the new one is numbered: my_lora_00002.",
            },
        ),
    }


def _number(default: float, maximum: float, step: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return ("FLOAT", {"default": default, "min": 0.0, "max": maximum, "step": step, "round": False, "tooltip": tooltip})


def _more_train_inputs() -> dict[str, Any]:
    return {
        "t_range": (
            list(T_RANGES),
            {
                "default": "native",
                "tooltip": "Flow times that diff2flow trains. native: those the checkpoint knows (0.064 to 0.972 for"
                " Stable Diffusion); sampling starts where it always did, in any sampler. full: all of 0 to 1;"
                " sampling starts at pure noise (Diff2Flow nodes read that from the LoRA), which allows really dark"
                " and bright images but takes more steps to learn.",
            },
        ),
        "weighting": (
            list(WEIGHTINGS),
            {
                "default": "clamped",
                "tooltip": "Weight of the velocity's error over time, for diff2flow. velocity: flow matching as in the"
                " paper; for an eps checkpoint it weighs noisy images up to 244 times, so that one of them can own a"
                " step. clamped: the same for flow times above 0.25, limited to 16 times below; nothing changes for v"
                " checkpoints. eps: every time like the noise error that the checkpoint was trained on.",
            },
        ),
        "warmup_steps": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 1_000_000,
                "tooltip": "Steps in which the learning rate rises from 0; 0 to 100.",
            },
        ),
        "weight_decay": _number(
            0.01, 10.0, 0.001, "Weight decay of AdamW, without unit; 0 to 0.1. Pulls towards the base."
        ),
        "max_grad_norm": _number(
            1.0, 1000.0, 0.1, "The gradient's norm is clipped to this; 1 is usual, 0 does not clip."
        ),
        "precision": (
            list(PRECISIONS),
            {
                "default": "auto",
                "tooltip": "Number format of the network's products while training; LoRA weights are always float32."
                " auto: bf16 on GPUs that have it, else fp16; the checkpoint's own on the CPU.",
            },
        ),
        "save_dtype": (
            list(DTYPES),
            {
                "default": "fp16",
                "tooltip": "Number format of the saved LoRA. fp16 halves the file and is what others use.",
            },
        ),
        "recommended_steps": (
            "INT",
            {
                "default": 25,
                "min": 1,
                "max": 1000,
                "tooltip": "Sampling steps written into the LoRA for whoever loads it; 20 to 30 without reflow. Has no"
                " effect on training.",
            },
        ),
        "recommended_cfg": _number(
            7.0, 100.0, 0.1, "CFG written into the LoRA for whoever loads it; 4 to 8 without reflow."
        ),
    }
