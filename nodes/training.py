"""Nodes that make datasets and train LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import confined
from ..hosts import current
from ..training.encoding import Encoders, image_dataset
from ..training.finetune import DTYPES, LoraOutput, finetune
from ..training.images import folder_state
from ..training.layers import GROUPS, PRESETS, LoraSettings
from ..training.objective import OBJECTIVES, T_RANGES, WEIGHTINGS, ObjectiveSettings
from ..training.plot import loss_plot
from ..training.settings import PRECISIONS, TrainSettings
from .errors import names_node

CATEGORY = "Diff2Flow/training"


class Diff2FlowImageDataset:
    """Encodes a folder of images and captions for training, once."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_DATASET", "STRING")
    RETURN_NAMES = ("dataset", "summary")
    OUTPUT_TOOLTIPS = (
        "Latents and text embeddings for Diff2Flow Train.",
        "What is in the dataset: images, captions, and files that were skipped, by name and number.",
    )
    DESCRIPTION = (
        "Turns a folder of images with .txt captions into latents and text embeddings. They are kept on disk"
        " (models/datasets): a second run encodes only what is new or changed, an interrupted one goes on where it was."
        " Unreadable images are skipped and named in the log and in the summary."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": (
                    "STRING",
                    {
                        "default": "my_images",
                        "tooltip": "A folder inside ComfyUI's input folder, by name ('my_images', 'styles/ink'): png,"
                        " jpg, webp, bmp or tiff, 10 to 100 for a style. The caption of ink.png is ink.txt beside it;"
                        " subfolders are not read. Transparency is laid on white.",
                    },
                ),
                "vae": ("VAE", {"tooltip": "The autoencoder of the checkpoint that is trained."}),
                "clip": ("CLIP", {"tooltip": "The text encoder of the checkpoint that is trained."}),
                "resolution": (
                    "INT",
                    {
                        "default": 512,
                        "min": 8,
                        "max": 4096,
                        "step": 8,
                        "tooltip": "Side of the training images in pixels, a multiple of 8 (of 64 for full-size"
                        " checkpoints). 512 for SD1.x, 768 for SD2.x v, 1024 for SDXL. Images are scaled to cover the"
                        " square and cropped in the middle.",
                    },
                ),
            },
            "optional": {
                "trigger": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Word or phrase put in front of every caption, with a comma ('inkstyle'). Use it in"
                        " prompts to call the style. Empty: captions as they are.",
                    },
                ),
                "default_caption": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Caption of images that have no .txt ('a drawing'). Empty: a missing caption is an"
                        " error that names the files. An empty .txt is a caption, too: an empty one.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return folder is None or bool(_image_folder(folder))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(
        cls,
        folder: str | None = None,
        vae: Any = None,
        clip: Any = None,
        resolution: int | None = None,
        trigger: str | None = None,
        default_caption: str | None = None,
    ) -> str:
        """Another string when a file in the folder was added, removed or changed."""
        return "" if folder is None else folder_state(_image_folder(folder))

    @names_node("Diff2Flow Image Dataset")
    def build(
        self, folder: str, vae: Any, clip: Any, resolution: int, trigger: str = "", default_caption: str = ""
    ) -> tuple[Any, str]:
        host = current()
        path = _image_folder(folder)
        dataset = image_dataset(
            path,
            confined(host.folder("datasets"), folder),
            resolution,
            _encoders(host, vae, clip),
            lambda total: host.progress(total, f"Encoding {path.name}"),
            trigger,
            default_caption,
        )
        return dataset, dataset.summary()


def _image_folder(folder: str) -> Path:
    """The folder by its name inside the input folder; ValueError if it is not there."""
    try:
        path = current().path("input", folder)
    except ValueError as error:
        raise ValueError(f"folder: {error}") from error
    if not path.is_dir():
        raise ValueError(f"folder: '{folder}' is a file; give the name of the folder that it is in")
    return path


def _encoders(host: Any, vae: Any, clip: Any) -> Encoders:
    def text(caption: str) -> tuple[Any, Any]:
        context, extra = host.encode_text(clip, caption)[0][:2]
        return context, extra.get("pooled_output")

    def image(pixels: Any) -> Any:
        return host.encode_image(vae, pixels)

    return Encoders(image, text, host.fingerprint(vae), host.fingerprint(clip))


def _group_switch(default: bool, layers: str) -> tuple[str, dict[str, Any]]:
    return ("BOOLEAN", {"default": default, "tooltip": f"Preset custom only: train {layers}."})


class Diff2FlowLoraConfig:
    """Which layers a LoRA trains, and how finely."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_LORA",)
    RETURN_NAMES = ("lora",)
    OUTPUT_TOOLTIPS = ("For Diff2Flow Train.",)
    DESCRIPTION = (
        "What the LoRA trains. The presets are complete: rank, alpha and the switches below count for preset custom"
        " only."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "preset": (
                    [*PRESETS, "custom"],
                    {
                        "default": "light",
                        "tooltip": "light: rank 16 on attention, feed-forward and projections (6.8 M parameters on"
                        " SD1.5, a 14 MB file); a pure LoRA that ComfyUI, A1111, Forge and diffusers read."
                        " paper-small: rank 64, convolutions too, first and last layer in full (61 M), for reflow."
                        " paper-base: rank 20 % of each layer (214 M), for new tasks. The two papers' presets save"
                        " whole layers (.diff), which ComfyUI and Forge read and diffusers ignores. custom: the"
                        " inputs below.",
                    },
                ),
                "rank": (
                    "INT",
                    {
                        "default": 16,
                        "min": 1,
                        "max": 1024,
                        "tooltip": "Preset custom only: rank of each layer's LoRA, without unit. 4 to 16 for a style,"
                        " 32 to 128 for more; file size and memory grow with it.",
                    },
                ),
                "alpha": (
                    "FLOAT",
                    {
                        "default": 16.0,
                        "min": 0.0,
                        "max": 1024.0,
                        "step": 0.5,
                        "tooltip": "Preset custom only: the LoRA counts alpha/rank times. The same as rank is usual;"
                        " half of it halves the learning rate's effect. 0: each layer's own rank.",
                    },
                ),
            },
            "optional": _custom_inputs(),
        }

    @names_node("Diff2Flow LoRA Config")
    def build(
        self,
        preset: str,
        rank: int,
        alpha: float,
        rank_ratio: float = 0.0,
        self_attention: bool = True,
        cross_attention: bool = True,
        attention_out: bool = True,
        feed_forward: bool = True,
        proj: bool = True,
        conv: bool = False,
        time: bool = False,
        ends_in_full: bool = False,
    ) -> tuple[LoraSettings]:
        if preset in PRESETS:
            return (PRESETS[preset],)
        if preset != "custom":
            raise ValueError(f"preset must be one of {', '.join((*PRESETS, 'custom'))}, not {preset!r}")
        switches = (self_attention, cross_attention, attention_out, feed_forward, proj, time, conv)
        groups = tuple(group for group, on in zip(GROUPS, switches, strict=True) if on)
        return (LoraSettings("custom", groups, rank, rank_ratio, alpha, ends_in_full),)


def _custom_inputs() -> dict[str, Any]:
    return {
        "rank_ratio": (
            "FLOAT",
            {
                "default": 0.0,
                "min": 0.0,
                "max": 1.0,
                "step": 0.01,
                "tooltip": "Preset custom only: rank as a part of the larger side of each layer, 0 to 1, instead of"
                " rank. The paper's is 0.2. 0: rank counts.",
            },
        ),
        "self_attention": _group_switch(True, "queries, keys and values of self-attention"),
        "cross_attention": _group_switch(True, "queries, keys and values of cross-attention (text)"),
        "attention_out": _group_switch(True, "the output layers of both attentions"),
        "feed_forward": _group_switch(True, "the feed-forward layers of the transformer blocks"),
        "proj": _group_switch(True, "proj_in and proj_out around the transformer blocks"),
        "conv": _group_switch(
            False, "all convolutions but the first and the last; in SD1.x that includes proj_in and proj_out"
        ),
        "time": _group_switch(False, "the time embedding and its projections into the blocks"),
        "ends_in_full": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "Preset custom only: train the first and the last convolution whole instead of by LoRA."
                " Saved as .diff, which ComfyUI and Forge read and diffusers ignores.",
            },
        ),
    }


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
