"""Nodes that say how training is done: loss, optimizer, and what is watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..hosts import current
from ..samplers import SOLVERS
from ..training.choices import PRECISIONS
from ..training.objective import LOSSES, SWITCH, T_RANGES, WEIGHTINGS, ObjectiveSettings
from ..training.optimizers import OPTIMIZERS
from ..training.rates import SCHEDULES
from ..training.times import DISTRIBUTIONS
from ..training.transport import PAIRINGS
from .effects import tells_the_page
from .errors import names_node
from .widgets import choice, count, listed_numbers, number, seed, switch, text

if TYPE_CHECKING:
    from ..training.finetune import Watch
    from ..training.settings import OptimizerSettings

CATEGORY = "Diff2Flow/training"


@tells_the_page
class Diff2FlowLossConfig:
    """What is minimised, in detail."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_LOSS",)
    RETURN_NAMES = ("loss",)
    OUTPUT_TOOLTIPS = ("For Diff2Flow Train.",)
    SEARCH_ALIASES = ("huber loss", "flow times", "timestep sampling", "caption dropout")
    DESCRIPTION = "Flow times, weighting and shape of the loss. Without this node its defaults are used."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {**_time_inputs(), **_loss_inputs()}}

    @names_node("Diff2Flow Loss Config")
    def build(
        self,
        t_range: str = "native",
        weighting: str = "clamped",
        time_distribution: str = "uniform",
        logit_mean: float = 0.0,
        logit_spread: float = 1.0,
        loss: str = "l2",
        delta: float = 0.1,
        caption_dropout: float = 0.0,
        zero_terminal_snr: str = "auto",
        pairing: str = PAIRINGS[0],
    ) -> tuple[ObjectiveSettings]:
        return (
            ObjectiveSettings(
                t_range=t_range,
                weighting=weighting,
                time_distribution=time_distribution,
                logit_mean=logit_mean,
                logit_spread=logit_spread,
                loss=loss,
                delta=delta,
                zero_terminal_snr=zero_terminal_snr,
                caption_dropout=caption_dropout,
                pairing=pairing,
            ),
        )


def _time_inputs() -> dict[str, Any]:
    return {
        "t_range": choice(
            T_RANGES,
            "native",
            "Flow times that diff2flow trains. native: those the checkpoint knows (0.064 to 0.972 for Stable"
            " Diffusion); sampling starts where it always did, in any sampler. full: all of 0 to 1; sampling starts at"
            " pure noise (Diff2Flow nodes read that from the LoRA), which allows really dark and bright images but"
            " takes more steps to learn. clamped: as full, but what lies outside of native is trained at its ends, so"
            " that the very start of sampling is trained often; for reflow.",
        ),
        "weighting": choice(
            WEIGHTINGS,
            "clamped",
            "Weight of the velocity's error over time, for diff2flow. velocity: flow matching as in the paper; for an"
            " eps checkpoint it weighs noisy images up to 244 times, so that one of them can own a step. clamped: the"
            " same for flow times above 0.25, limited to 16 times below; nothing changes for v checkpoints. eps: every"
            " time like the noise error that the checkpoint was trained on.",
        ),
        "time_distribution": choice(
            DISTRIBUTIONS,
            "uniform",
            "How often each flow time is trained. uniform: all alike, as in the paper. logit_normal: mostly the middle"
            " (SD3). mode: more in the middle, the ends not forgotten (SD3). u_shaped: nearly all at both ends,"
            " for reflow. u_shaped_lee: more at both ends, for reflow, as Lee, Lin, Fanti (2024) have it.",
        ),
        "logit_mean": number(
            0.0,
            5.0,
            0.1,
            "For logit_normal: mean of the logit of the flow time; above 0 nearer to the image, below 0 nearer to the"
            " noise. 0 is usual.",
            minimum=-5.0,
        ),
        "logit_spread": number(1.0, 5.0, 0.1, "For logit_normal: its standard deviation; 1 is usual.", minimum=0.01),
    }


def _loss_inputs() -> dict[str, Any]:
    return {
        "loss": choice(
            LOSSES,
            "l2",
            "l2: squared error. huber and pseudo_huber: squared for small errors, linear for large ones, so that"
            " outliers (a wrong caption, a watermark) pull less; pseudo_huber looks at whole images.",
        ),
        "delta": number(
            0.1,
            100.0,
            0.01,
            "For the two Huber losses: the error at which they turn linear, in standard deviations of the latent; 0.1"
            " to 1. Smaller is more forgiving of outliers and learns more slowly. 0: 0.00054 times the root of the"
            " number of latent values (0.07 at 512 px), as usual in reflow.",
        ),
        "caption_dropout": number(
            0.0,
            1.0,
            0.05,
            "Share of images trained without their caption, 0 to 1. 0.1 keeps CFG effective in long trainings; 0 for"
            " short ones.",
        ),
        "zero_terminal_snr": choice(
            SWITCH,
            "auto",
            "Trains on a schedule that ends in pure noise. v-prediction checkpoints only; auto: as the checkpoint"
            " says. An eps checkpoint reaches the same by t_range full.",
        ),
        "pairing": choice(
            PAIRINGS,
            PAIRINGS[0],
            "Which noise each image is trained with, for diff2flow and flow_matching. independent: the one drawn for"
            " it, as in the paper. optimal_transport: within each network call the noises go to the images they are"
            " nearest to, which makes paths straighter. It wants a batch_size of 16 or more (per process, divided by"
            " accumulation) and images that share one caption: between different captions it ties the noise to the"
            " content, and sampling, whose noise knows no caption, then fits the training less. Not for reflow pairs,"
            " which have their own noise.",
        ),
    }


@tells_the_page
class Diff2FlowOptimizerConfig:
    """How the weights move."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_OPTIMIZER",)
    RETURN_NAMES = ("optimizer",)
    OUTPUT_TOOLTIPS = ("For Diff2Flow Train.",)
    SEARCH_ALIASES = ("AdamW", "Prodigy", "Adafactor", "learning rate schedule", "EMA", "gradient checkpointing")
    DESCRIPTION = "Optimizer, learning rate schedule, precision and memory. Without this node its defaults are used."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {**_optimizer_inputs(), **_memory_inputs()}}

    @names_node("Diff2Flow Optimizer Config")
    def build(
        self,
        optimizer: str = "adamw",
        schedule: str = "constant",
        warmup_steps: int = 0,
        weight_decay: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.999,
        max_grad_norm: float = 1.0,
        ema: float = 0.0,
        text_rate: float = 0.5,
        precision: str = "auto",
        accumulation: int = 1,
        checkpointing: bool = False,
        compile: bool = False,
    ) -> tuple[OptimizerSettings]:
        from ..training.settings import OptimizerSettings

        return (
            OptimizerSettings(
                name=optimizer,
                schedule=schedule,
                warmup_steps=warmup_steps,
                weight_decay=weight_decay,
                beta1=beta1,
                beta2=beta2,
                max_grad_norm=max_grad_norm,
                accumulation=accumulation,
                checkpointing=checkpointing,
                ema=ema,
                precision=precision,
                compile=compile,
                text_rate=text_rate,
            ),
        )


def _optimizer_inputs() -> dict[str, Any]:
    return {
        "optimizer": choice(
            OPTIMIZERS,
            "adamw",
            "adamw: the usual one. adamw_8bit: its state in a quarter of the memory (package bitsandbytes). adafactor:"
            " hardly any state. prodigy: finds the learning rate itself, set learning_rate to 1 (package prodigyopt)."
            " schedule_free: AdamW that needs no schedule (package schedulefree).",
        ),
        "schedule": choice(
            SCHEDULES,
            "constant",
            "Learning rate over the run, after the warm-up. cosine and linear fall to 0; exponential falls to a"
            " hundredth, as the paper's trainer does. Other than constant, a finished run cannot be continued with"
            " more steps.",
        ),
        "warmup_steps": count(0, 0, 1_000_000, "Steps in which the learning rate rises from 0; 0 to 100."),
        "weight_decay": number(0.01, 10.0, 0.001, "Without unit, 0 to 0.1. Pulls towards the base model."),
        "beta1": number(0.9, 0.9999, 0.01, "Decay of the running mean of gradients, 0 to below 1; 0.9 is usual."),
        "beta2": number(
            0.999, 0.99999, 0.001, "Decay of the running mean of squared gradients, 0 to below 1; 0.99 to 0.999."
        ),
        "max_grad_norm": number(
            1.0, 1000.0, 0.1, "The gradient's norm is clipped to this; 1 is usual, 0 does not clip."
        ),
        "ema": number(
            0.0,
            0.99999,
            0.001,
            "Averages the weights over about 1/(1 - this) steps and saves the average: 0.99 for a few hundred steps,"
            " 0.999 for thousands. 0: no average.",
        ),
        "text_rate": number(
            0.5,
            10.0,
            0.05,
            "Learning rate of the text encoder's LoRA as a part of the network's, where LoRA Config trains it; 0.1 to"
            " 1.",
        ),
    }


def _memory_inputs() -> dict[str, Any]:
    return {
        "precision": choice(
            PRECISIONS,
            "auto",
            "Number format of the network's products while training; LoRA weights are always float32. auto: bf16 on"
            " GPUs that have it, fp16 on older NVIDIA cards, fp32 on the CPU and on Macs. fp32 computes in float32,"
            " whatever the checkpoint is stored in, for which half-precision weights are kept a second time.",
        ),
        "accumulation": count(
            1,
            1,
            4096,
            "Splits the batch into this many parts, one network call each: the same training in less memory. Must"
            " divide batch_size.",
        ),
        "checkpointing": switch(
            False, "Computes activations a second time instead of keeping them: about a third slower, far less memory."
        ),
        "compile": switch(
            False, "torch.compile: the first step takes minutes, the later ones are faster on most GPUs."
        ),
    }


@dataclass(frozen=True)
class WatchConfig:
    """What D2F_WATCH carries: what is watched, and the share of the dataset that is held out for it."""

    watch: Watch
    held_out_share: float


@tells_the_page
class Diff2FlowTrainWatch:
    """What is looked at while training."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_WATCH",)
    RETURN_NAMES = ("watch",)
    OUTPUT_TOOLTIPS = ("For Diff2Flow Train.",)
    SEARCH_ALIASES = ("validation loss", "training samples", "TensorBoard", "preview while training")
    DESCRIPTION = (
        "Samples while training, by ComfyUI's own sampler, from the same prompts and seeds each time, and the loss on"
        " images that are not trained on. Everything lands in the run's folder in output/diff2flow:"
        " samples/*.png, log.jsonl."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": _sample_inputs(), "optional": _validation_inputs()}

    @names_node("Diff2Flow Train Watch")
    def build(
        self,
        vae: Any,
        clip: Any,
        prompts: str,
        sample_every: int,
        sample_steps: str,
        cfg: float,
        width: int,
        height: int,
        seed: int,
        negative: str = "",
        solver: str = "euler",
        validate_every: int = 0,
        held_out_share: float = 0.1,
        validation: Any = None,
        tensorboard: bool = False,
        images: Any = None,
    ) -> tuple[WatchConfig]:
        from ..hosts.training_samples import SamplePlan, TrainingDepth, TrainingSamples
        from ..training.finetune import Watch

        if not 0.0 < held_out_share < 1.0:
            raise ValueError(f"held_out_share must be above 0 and below 1, not {held_out_share}; 0.1 is usual")
        draw = None
        if sample_every:
            lines = tuple(line.strip() for line in prompts.splitlines() if line.strip()) or ("",) * (images is not None)
            counts = listed_numbers(sample_steps, "sample_steps")
            plan = SamplePlan(lines, negative, counts, cfg, width, height, seed, solver)
            draw = TrainingSamples(current(), plan, vae, clip)
            if images is not None:
                draw = TrainingDepth(current(), plan, vae, clip, images)
        watch = Watch(sample_every, draw, validate_every, validation, tensorboard)
        return (WatchConfig(watch, held_out_share if validate_every and validation is None else 0.0),)


def _sample_inputs() -> dict[str, Any]:
    return {
        "vae": ("VAE", {"tooltip": "Decodes the samples: the autoencoder of the checkpoint that is trained."}),
        "clip": ("CLIP", {"tooltip": "Encodes the prompts: the text encoder of the checkpoint that is trained."}),
        "prompts": text("", "What is drawn, one prompt a line, one image each.", multiline=True),
        "sample_every": count(100, 0, 1_000_000, "Training steps between samples; 50 to 500. 0 draws none."),
        "sample_steps": text("25", "Sampling steps, several with commas between: '4, 25'. Those you will use later."),
        "cfg": number(7.0, 100.0, 0.1, "CFG of the samples; the one you will use later, 1 to 8."),
        "width": count(512, 8, 8192, "Width of the samples in pixels, a multiple of 8 (of 64 for full-size models)."),
        "height": count(512, 8, 8192, "Height of the samples in pixels, a multiple of 8 (of 64 for full-size models)."),
        "seed": seed("Seed of the first sample; each further prompt takes the next. The same every time."),
    }


def _validation_inputs() -> dict[str, Any]:
    return {
        "negative": text("", "Negative prompt of all samples; empty is usual while training."),
        "solver": choice(tuple(SOLVERS), "euler", "Solver of the samples; euler, unless you will use another later."),
        "validate_every": count(
            0,
            0,
            1_000_000,
            "Training steps between validations: the flow matching loss on held-out images, at fixed times and"
            " noises. It falls while the model learns and rises when it memorises. 0: none.",
        ),
        "held_out_share": number(
            0.1,
            0.9,
            0.01,
            "Share of the dataset's images that is kept out of training for the validation, above 0, 0.05 to 0.2. Not"
            " used where a validation dataset is connected.",
            minimum=0.01,
        ),
        "validation": (
            "D2F_DATASET",
            {"default": None, "tooltip": "Images for the validation, instead of a share of the training images."},
        ),
        "tensorboard": switch(
            False, "Event files for TensorBoard beside log.jsonl (package tensorboardX): losses, rates, norms."
        ),
        "images": (
            "IMAGE",
            {
                "default": None,
                "tooltip": "Depth only: images whose depth is drawn instead of prompts, in the size they have; sides in"
                " multiples of 8 px.",
            },
        ),
    }
