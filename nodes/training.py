"""The node that trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..hosts import current
from ..training.choices import DTYPES, RESUME
from ..training.layers import LoraSettings
from ..training.objective import OBJECTIVES, ObjectiveSettings
from ..training.recipes import EXPERT, TASK_NAMES, goal_of
from .errors import names_node
from .products import lost
from .running import note, note_patches, written
from .widgets import choice, count, line, number, seed, switch

if TYPE_CHECKING:
    from ..training.finetune import Watch
    from ..training.product import Finetuned
    from ..training.settings import OptimizerSettings
    from .training_options import WatchConfig

CATEGORY = "Diff2Flow/training"
RUNS = "diff2flow"
"""Folder of all runs, inside the output folder."""
_stopped: Counter[str] = Counter()
"""How often a run of that name was stopped before its last step, and its outputs handed on all the same."""


class Diff2FlowTrain:
    """Trains a LoRA and hands on the model with it."""

    CATEGORY = CATEGORY
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("MODEL", "STRING", "IMAGE", "CLIP")
    RETURN_NAMES = ("model", "lora_name", "loss_plot", "clip")
    OUTPUT_TOOLTIPS = (
        "The model with the trained LoRA at strength 1, the very weights that were saved.",
        "Name of the saved LoRA in the folder 'loras'.",
        "The loss of every step, and its running mean.",
        "The connected CLIP, with its trained LoRA where LoRA Config trains the text encoder.",
    )
    SEARCH_ALIASES = (
        "LoRA trainer",
        "train LoRA",
        "finetune",
        "flow matching",
        "rectified flow",
        "reflow",
        "few steps",
    )
    DESCRIPTION = (
        "Finetunes a Stable Diffusion model with a LoRA on the Diff2Flow loss: the model keeps its own time and scale,"
        " the loss is that of flow matching. Cancel, an error or a full memory saves the LoRA as far as it has come."
        " An existing LoRA is never overwritten: the new one gets a number (name_00002)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        optional = {"recipe": _recipe(), **_keeping_inputs(), **_linked_inputs()}
        graph = {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"}
        return {"required": _train_inputs(), "optional": optional, "hidden": graph}

    @classmethod
    def VALIDATE_INPUTS(cls, output_name: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        from ..training.product import Output

        try:
            return output_name is None or bool(Output(current().folder("loras"), output_name))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, output_name: str | None = None, **inputs: Any) -> int:
        """Another number after "Stop and save", and when the file is gone: queued again with the same inputs, the run
        goes on, or writes its file again."""
        stopped = _stopped[output_name] if output_name else _stopped.total()
        return stopped + lost("Diff2FlowTrain", {"output_name": output_name, **inputs})

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
        recipe: str = EXPERT,
        resume: str = "auto",
        save_every: int = 250,
        keep_states: int = 2,
        save_dtype: str = "fp16",
        recommended_steps: int = 0,
        recommended_cfg: float = 0.0,
        memory_check: bool = True,
        loss: ObjectiveSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        watch: WatchConfig | None = None,
        clip: Any = None,
        prompt: Mapping[str, Any] | None = None,
        unique_id: str = "",
    ) -> dict[str, Any]:
        from ..training.finetune import Job, Keeping, finetune
        from ..training.plot import loss_plot
        from ..training.product import Output
        from ..training.settings import OptimizerSettings, TrainSettings

        if clip is None:
            _require_clip_unused(prompt or {}, unique_id, self.RETURN_TYPES.index("CLIP"))
        host = current()
        goal = replace(goal_of(recipe, dataset, loss), name=objective)
        settings = TrainSettings(steps, batch_size, learning_rate, seed, goal, optimizer or OptimizerSettings())
        folder = host.folder("checkpoints" if lora.full else "loras")
        output = Output(
            folder, output_name, save_dtype, *_recommended(recommended_steps, recommended_cfg, dataset, goal)
        )
        keeping = Keeping(host.folder("output") / RUNS, save_every, keep_states, resume, memory_check)
        for idle in _without_effect(dataset, lora, objective, loss, optimizer):
            note(idle)
        dataset, watched = _watched(dataset, watch, seed)
        host.facts(model)
        note_patches(host, model, "are not trained with; samples drawn on the way and the trained model have them")
        encoder = clip if lora.text_encoder else None
        ids = [host.fingerprint(thing) for thing in (model, encoder) if thing is not None]
        progress = host.progress(steps, f"Training {output_name}")
        with host.training(model, encoder) as backbone:
            job = Job(backbone, dataset, lora, settings, output, keeping, watched, *ids)
            result = finetune(job, progress)
        if len(result.losses) < steps:
            _stopped[output_name] += 1
        written(folder / result.name)
        trained, encoder = _trained(host, model, encoder, lora, result)
        plot = loss_plot(result.losses, result.name)
        return {"ui": _shown(result), "result": (trained, result.name, plot, clip if encoder is None else encoder)}


def _shown(result: Finetuned) -> dict[str, list[Any]]:
    """What a client of the API finds in the history: the file, the steps made, the last loss and the mean of them."""
    losses = result.losses
    return {"file": [result.name], "steps": [len(losses)], "last_loss": losses[-1:], "mean_loss": [fmean(losses)]}


def _without_effect(
    dataset: Any,
    lora: LoraSettings,
    objective: str,
    loss: ObjectiveSettings | None,
    optimizer: OptimizerSettings | None,
) -> Iterator[str]:
    """A sentence for each setting of the connected nodes that differs from its default and does nothing here."""
    if lora.widening != LoraSettings.widening and not dataset.image_channels:
        yield f"lora: widening ({lora.widening!r}) has no effect: it counts where the dataset holds depth"
    if optimizer is not None and optimizer.text_rate != type(optimizer).text_rate and not lora.text_encoder:
        yield (
            f"optimizer: text_rate ({optimizer.text_rate}) has no effect: it counts where text_encoder is on in"
            " Diff2Flow LoRA Config"
        )
    if loss is None:
        return
    if objective != "diff2flow":
        for name in ("t_range", "weighting"):
            value = getattr(loss, name)
            if value != getattr(ObjectiveSettings, name):
                yield f"loss: {name} ({value!r}) has no effect: it counts where objective is 'diff2flow'"
    if loss.caption_dropout and not any(dataset.captions()):
        yield f"loss: caption_dropout ({loss.caption_dropout}) has no effect: the dataset has no captions"


def _require_clip_unused(prompt: Mapping[str, Any], unique_id: str, output: int) -> None:
    """Raises where a node of the workflow takes the output clip, which is empty without the input."""
    takers = [
        f"{node['class_type']} (node {number}, {name})"
        for number, node in prompt.items()
        for name, value in node.get("inputs", {}).items()
        if value == [unique_id, output]
    ]
    if takers:
        raise ValueError(
            f"clip: nothing is connected, so that the output clip is empty, and {takers[0]} takes it; connect the"
            " checkpoint's CLIP to clip here, or to that node"
        )


def _trained(host: Any, model: Any, clip: Any, lora: LoraSettings, result: Finetuned) -> tuple[Any, Any]:
    """MODEL and CLIP (None where it was not trained) as they were saved: the checkpoint, or with the LoRA."""
    if lora.full:
        return host.load_checkpoint(result.name)[0], None
    return host.apply_lora(model, clip, result.state, 1.0, result.metadata)


def _recommended(steps: int, cfg: float, dataset: Any, goal: ObjectiveSettings) -> tuple[int, float]:
    """Steps and CFG to sample with: what was given, else what suits what is trained."""
    few = dataset.has_noise or goal.reflow.windows
    usual_steps, usual_cfg = (max(4, goal.reflow.windows), 1.0) if few else (25, 7.0)
    if dataset.image_channels:
        usual_steps, usual_cfg = 10, 1.0
    return steps or usual_steps, cfg or usual_cfg


def _watched(dataset: Any, config: WatchConfig | None, seed: int) -> tuple[Any, Watch]:
    """The dataset without what is held out of it, and what is watched."""
    from ..training.finetune import Watch

    if config is None:
        return dataset, Watch()
    _require_fitting(dataset, config)
    if not config.held_out_share:
        return dataset, config.watch
    dataset, held_out = dataset.split(config.held_out_share, seed)
    return dataset, replace(config.watch, held_out=held_out)


def _require_fitting(dataset: Any, config: WatchConfig) -> None:
    """ValueError where samples are of images and depth is trained, or the other way round."""
    draw = config.watch.draw
    if draw is not None and draw.of_depth != bool(dataset.image_channels):
        way = (
            "connect images to Diff2Flow Train Watch"
            if dataset.image_channels
            else "take images off Diff2Flow Train Watch"
        )
        raise ValueError(
            f"watch: its samples are {'depth' if draw.of_depth else 'images of prompts'}, which is not what"
            f" '{dataset.name}' trains; {way}, or set sample_every to 0"
        )


def _train_inputs() -> dict[str, Any]:
    return {
        "model": ("MODEL", {"tooltip": "The Stable Diffusion 1.x, 2.x or SDXL model to finetune, from a checkpoint."}),
        "dataset": (
            "D2F_DATASET",
            {
                "tooltip": "From Diff2Flow Image Dataset, made with the same checkpoint's VAE and CLIP; or from"
                " Diff2Flow Reflow Pairs: then each pair's own noise is trained (connect Diff2Flow Reflow Recipe); or"
                " from Diff2Flow Depth Dataset: then the network learns depth and looks at the image."
            },
        ),
        "lora": ("D2F_LORA", {"tooltip": "From Diff2Flow LoRA Config: which layers are trained."}),
        "objective": choice(
            OBJECTIVES,
            "diff2flow",
            "What is minimised. diff2flow: the flow matching loss through the aligned network."
            " flow_matching: the same without alignment, for comparison (needs Diff2Flow nodes to sample)."
            " diffusion: the checkpoint's own eps or v loss, for comparison.",
        ),
        "steps": count(
            1000,
            1,
            10_000_000,
            "Optimizer steps. 500 to 3000 for a style or subject, about 50 to 100 per image at batch 1.",
        ),
        "batch_size": count(
            1,
            1,
            4096,
            "Images a step, in one call of the network, each with its own caption and time. 1 fits"
            " SD1.x at 512 px into 8 GB; 4 or more trains more steadily where memory allows.",
        ),
        "learning_rate": number(
            1e-4,
            1.0,
            1e-6,
            "Learning rate of AdamW, without unit. 1e-4 for a LoRA at alpha = rank; 2e-5 to 5e-5 for the"
            " paper's presets; lower it if the loss jumps.",
            minimum=1e-9,
        ),
        "seed": seed(
            "Seed of order, noise, times and the LoRA's first weights. On the CPU the same seed trains"
            " the same LoRA to the bit."
        ),
        "output_name": line(
            "my_lora",
            "Name of the LoRA in the folder 'loras', without ending; subfolders are allowed"
            " ('styles/ink'). Where it exists, the new one is numbered: my_lora_00002.",
        ),
    }


def _recipe() -> Any:
    return choice(
        TASK_NAMES,
        TASK_NAMES[0],
        "What you train. finetune: a style or subject, from images. few_steps: fewer sampling steps, from reflow pairs"
        " (takes Reflow Recipe's fast where nothing is connected to loss). depth: from images with their depth. These"
        " three show only what is usually changed, and check that the dataset fits; expert shows every input and takes"
        " any dataset. Hidden inputs keep their values.",
    )


def _keeping_inputs() -> dict[str, Any]:
    return {
        "resume": choice(
            RESUME,
            "auto",
            "auto: a run of this name with the same settings goes on from its last saved state, also after a crash; on"
            " the CPU it ends with the very same weights as if it had never stopped. new: always begins again.",
        ),
        "save_every": count(
            250,
            0,
            1_000_000,
            "Training steps between saves: of the LoRA, and of a state to go on from (in output/diff2flow, in a folder"
            " named like the LoRA); a crash loses at most these. 0: saves only at the end, at Cancel and at an error.",
        ),
        "keep_states": count(
            2, 1, 1000, "How many saved states are kept, the newest; each holds weights and optimizer."
        ),
        "save_dtype": choice(
            tuple(DTYPES), "fp16", "Number format of the saved LoRA. fp16 halves the file and is what others use."
        ),
        "recommended_steps": count(
            0,
            0,
            1000,
            "Sampling steps written into the LoRA for whoever loads it. 0: 4 where reflow pairs or windows are trained,"
            " 10 for depth, else 25. Has no effect on training.",
        ),
        "recommended_cfg": number(
            0.0,
            100.0,
            0.1,
            "CFG written into the LoRA for whoever loads it. 0: 1 where reflow pairs or windows are trained (the"
            " teacher's CFG is in them; up to 2 strengthens the prompt and lets negatives work) and for depth, else 7.",
        ),
        "memory_check": switch(
            True, "Estimates the memory before the first step and says what to change where it does not fit."
        ),
    }


def _linked_inputs() -> dict[str, Any]:
    return {
        "loss": (
            "D2F_LOSS",
            {
                "default": None,
                "tooltip": "From Diff2Flow Loss Config or Diff2Flow Reflow Recipe; Loss Config's defaults without it.",
            },
        ),
        "optimizer": (
            "D2F_OPTIMIZER",
            {"default": None, "tooltip": "From Diff2Flow Optimizer Config; its defaults without it."},
        ),
        "watch": (
            "D2F_WATCH",
            {"default": None, "tooltip": "From Diff2Flow Train Watch: samples and validation while training."},
        ),
        "clip": (
            "CLIP",
            {
                "default": None,
                "tooltip": "Only where LoRA Config trains the text encoder: the CLIP of the checkpoint. The output"
                " clip is the trained one.",
            },
        ),
    }
