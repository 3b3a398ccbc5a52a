"""The node that makes pairs for reflow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import confined
from ..hosts import current
from ..hosts.choice import START_CHOICES, flow_of
from ..samplers import SOLVERS
from ..training.choices import DAMAGED, PAIR_DTYPES
from .datasets import inversions_state
from .effects import tells_the_page
from .errors import names_node
from .products import lost
from .running import note_patches, written
from .widgets import choice, count, number, seed, text

if TYPE_CHECKING:
    from ..training.prompts import Prompts
    from ..training.reflow import Maker

_WILDCARDS = "wildcards"
"""Folder of the wildcard files, inside the input folder."""


@tells_the_page
class Diff2FlowReflowPairs:
    """Lets a model make the pairs of noise and latent that straighten it."""

    CATEGORY = "Diff2Flow/training"
    FUNCTION = "build"
    OUTPUT_NODE = True
    RETURN_TYPES = ("D2F_DATASET", "STRING")
    RETURN_NAMES = ("dataset", "summary")
    OUTPUT_TOOLTIPS = (
        "Pairs for Diff2Flow Train, which then takes each pair's own noise.",
        "What is in it: pairs, how they were made, what is missing, and shards that were skipped, by name.",
    )
    SEARCH_ALIASES = ("rectified flow", "distillation pairs", "noise latent pairs", "few steps", "teacher")
    DESCRIPTION = (
        "Samples prompts × seeds along the model's own ODE and keeps noise and latent of each: trained on these pairs,"
        " the model's paths become straight and 1 to 4 steps are enough. The pairs are kept on disk (models/datasets);"
        " Cancel or a crash loses nothing that is finished, the next run goes on. A model with a reflowed LoRA can be"
        " the teacher of a second round. ControlNet, IP-Adapter and other patches of sampling have no effect here."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": _pair_inputs(), "optional": {**_prompt_inputs(), **_making_inputs(), **_share_inputs()}}

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        folder: str | None = None,
        prompts: str | None = None,
        prompts_file: str | None = None,
        shard: int | None = None,
        shards: int | None = None,
    ) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        from ..training.pairs import Share

        try:
            if shard is not None and shards is not None:
                Share(shard, shards)
            _prompts(prompts or "", prompts_file or "", ["of a dataset"])
            return folder is None or bool(_pairs_folder(folder))
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(
        cls,
        model: Any = None,
        clip: Any = None,
        prompts: str | None = None,
        count: int | None = None,
        steps: int | None = None,
        cfg: float | None = None,
        seed: int | None = None,
        folder: str | None = None,
        dataset: Any = None,
        prompts_file: str | None = None,
        negative: str | None = None,
        width: int | None = None,
        height: int | None = None,
        solver: str | None = None,
        start: str | None = None,
        batch_size: int | None = None,
        save_dtype: str | None = None,
        shard: int | None = None,
        shards: int | None = None,
        damaged: str | None = None,
    ) -> str:
        """Another string when the file of prompts, or a wildcard or textual inversion that they name, was changed, or when
        pairs are gone."""
        widgets = {"prompts": prompts, "count": count, "seed": seed, "folder": folder, "shard": shard, "shards": shards}
        named = _prompts(prompts or "", prompts_file or "", ["of a dataset"])
        inversions = inversions_state(chain(named.templates(), (prompts, negative)))
        return f"{named.digest()}{inversions} {lost('Diff2FlowReflowPairs', widgets)}"

    @names_node("Diff2Flow Reflow Pairs")
    def build(
        self,
        model: Any,
        clip: Any,
        prompts: str,
        count: int,
        steps: int,
        cfg: float,
        seed: int,
        folder: str,
        dataset: Any = None,
        prompts_file: str = "",
        negative: str = "",
        width: int = 512,
        height: int = 512,
        solver: str = "euler",
        start: str = "auto",
        batch_size: int = 0,
        save_dtype: str = "fp16",
        shard: int = 1,
        shards: int = 1,
        damaged: str = "skip",
    ) -> dict[str, Any]:
        from ..training.pairs import Share
        from ..training.reflow import PairSettings, reflow_pairs
        from ..training.teacher import TeacherSettings

        host = current()
        settings = PairSettings(
            count,
            seed,
            TeacherSettings(steps, cfg, solver),
            " ".join(negative.split()),
            (width, height),
            save_dtype,
            batch_size,
            Share(shard, shards),
            damaged,
        )
        note_patches(host, model, "have no effect on the pairs, which the bare network makes")
        folder_path = _pairs_folder(folder)
        collected = _prompts(prompts, prompts_file, () if dataset is None else dataset.captions())
        made = reflow_pairs(folder_path, collected, _maker(host, model, clip, start), settings, host.progress)
        written(folder_path)
        ui = {"folder": [folder], "pairs": [len(made)]}
        return {"ui": ui, "result": (made, made.summary())}


def _maker(host: Any, model: Any, clip: Any, start: str) -> Maker:
    from ..training.reflow import Maker

    facts = host.facts(model)
    if facts.in_channels != 4:
        raise ValueError(
            f"model: its network takes {facts.in_channels} input channels (inpainting and depth models have more than"
            " 4), so prompts alone are not enough for it; choose a plain checkpoint"
        )

    def encode(caption: str) -> tuple[Any, Any]:
        context, extra = host.encode_text(clip, caption)[0][:2]
        return context, extra.get("pooled_output")

    return Maker(
        lambda: host.training(model),
        flow_of(facts, start),
        host.fingerprint(model),
        host.fingerprint(clip),
        encode,
        facts.loras,
        lambda names: host.inversions(clip, names),
    )


def _prompts(text: str, file: str, captions: Iterable[str]) -> Prompts:
    from ..training.prompts import collected_prompts

    return collected_prompts(text, _prompts_file(file), captions, current().folder("input") / _WILDCARDS)


def _prompts_file(name: str) -> Path | None:
    """The file by its name inside the input folder; ValueError if it is not there."""
    if not name.strip():
        return None
    try:
        path = current().path("input", name)
    except ValueError as error:
        raise ValueError(f"prompts_file: {error}") from error
    if not path.is_file():
        raise ValueError(f"prompts_file: '{name}' is a folder; give the name of a text file, such as 'prompts.txt'")
    return path


def _pairs_folder(name: str) -> Path:
    """The folder by its name inside the datasets folder; ValueError if the name is not allowed."""
    try:
        return confined(current().folder("datasets"), name)
    except ValueError as error:
        raise ValueError(f"folder: {error}") from error


def _pair_inputs() -> dict[str, Any]:
    return {
        "model": (
            "MODEL",
            {
                "tooltip": "The teacher: a Stable Diffusion 1.x, 2.x or SDXL model, with or without LoRAs; the one that"
                " is trained on the pairs afterwards."
            },
        ),
        "clip": ("CLIP", {"tooltip": "The text encoder of the same checkpoint."}),
        "prompts": text(
            "",
            "One prompt a line. Words in curly braces with bars between them are alternatives, __colors__ is a line of"
            " input/wildcards/colors.txt; both may be nested, and are chosen anew for each pair, by the seed. Empty:"
            " only prompts_file and dataset.",
            multiline=True,
        ),
        "count": count(
            1000,
            1,
            100_000_000,
            "Number of pairs over all shards: prompts times seeds. The prompts are gone through again and again, each"
            " time with other noise. 1000 to try, 10000 to 100000 in earnest; raising it later goes on.",
        ),
        "steps": count(
            40, 1, 1000, "Steps of the teacher's solver; 40 with euler as in the paper, 20 with a solver of order 2."
        ),
        "cfg": number(
            7.5,
            100.0,
            0.1,
            "The teacher's guidance, which goes into the pairs: 7.5 as in the paper, 3 to 5 for fewer oversaturated"
            " images. At 1 the negative is not computed and a pair costs half. A reflowed teacher wants 1 to 2.",
        ),
        "seed": seed("Seed of all noises and wildcards; pair k is the same whenever and wherever it is made."),
        "folder": text(
            "my_pairs",
            "Folder inside models/datasets that keeps the pairs. What is there is not made again; pairs of other"
            " settings are refused. To merge those of several machines, put their shards into one folder (or into"
            " subfolders of it).",
        ),
    }


def _prompt_inputs() -> dict[str, Any]:
    return {
        "dataset": (
            "D2F_DATASET",
            {"default": None, "tooltip": "A dataset whose captions are prompts as well, each of them once."},
        ),
        "prompts_file": text(
            "", "A text file inside ComfyUI's input folder ('prompts.txt'), one prompt a line, in UTF-8. Empty: none."
        ),
        "negative": text("", "What the teacher's guidance leads away from; empty is usual. Without effect at CFG 1."),
    }


def _making_inputs() -> dict[str, Any]:
    return {
        "width": count(512, 8, 8192, "Width in pixels, a multiple of 8 (of 64 in earnest): 512, SDXL 1024."),
        "height": count(512, 8, 8192, "Height in pixels, a multiple of 8 (of 64 in earnest): 512, SDXL 1024."),
        "solver": choice(
            tuple(SOLVERS),
            "euler",
            "How the teacher's path is followed; network evaluations a step: euler and ab2 1, midpoint and heun 2, rk4"
            " 4, dopri5 7 or more.",
        ),
        "start": choice(
            START_CHOICES,
            "auto",
            "Where the teacher begins. terminal: at the last timestep it was trained on (a checkpoint as it is)."
            " noise: at flow time 0 (a LoRA trained over the full range). auto: what the LoRA's metadata says.",
        ),
        "batch_size": count(
            0,
            0,
            4096,
            "Pairs in one call of the network, which is twice as many images with CFG. 0: the most that fits into"
            " memory, up to 64. Halved by itself when memory runs out; fewer where a call of these would take more"
            " than 12 seconds, so that Cancel and a crash lose little.",
        ),
        "save_dtype": choice(
            tuple(PAIR_DTYPES),
            "fp16",
            "Number format of what is saved. fp16: 32 KB for a pair of 512 × 512 px, and 118 KB (SD1.x) for each"
            " different prompt; fp32: twice that. The noise is not saved but drawn again from the seed.",
        ),
    }


def _share_inputs() -> dict[str, Any]:
    return {
        "shard": count(1, 1, 10_000, "Which part of the pairs this machine makes, 1 to shards."),
        "shards": count(1, 1, 10_000, "Number of parts: one for each machine, 1 if there is but one."),
        "damaged": choice(
            DAMAGED,
            "skip",
            "What happens to a shard that was cut short or altered. skip: it is named in the log and the summary, and"
            " its pairs are made again. refuse: it is an error.",
        ),
    }
