"""The node that chooses how a model is made straight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..training.objective import WEIGHTINGS, ObjectiveSettings
from ..training.recipes import DROPPED, RECIPES, WINDOWS
from .effects import tells_the_page
from .errors import names_node
from .widgets import choice, count, number

AS_RECIPE = "recipe"


@tells_the_page
class Diff2FlowReflowRecipe:
    """Complete settings for reflow, by name."""

    CATEGORY = "Diff2Flow/training"
    FUNCTION = "build"
    RETURN_TYPES = ("D2F_LOSS",)
    RETURN_NAMES = ("loss",)
    OUTPUT_TOOLTIPS = ("For the input loss of Diff2Flow Train.",)
    SEARCH_ALIASES = ("rectified flow", "few steps", "one step", "PeRFlow", "distillation")
    DESCRIPTION = (
        "How Diff2Flow Train makes paths straight, so that 4, 2 or 1 steps are enough. fast and paper want pairs from"
        " Diff2Flow Reflow Pairs; windows wants images and calls the teacher while training."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"recipe": _recipe()}, "optional": {**_pair_inputs(), **_window_inputs()}}

    @names_node("Diff2Flow Reflow Recipe")
    def build(
        self,
        recipe: str,
        caption_dropout: float = 0.1,
        weighting: str = AS_RECIPE,
        drop_worst: float = DROPPED,
        consistency: float = 0.0,
        windows: int = WINDOWS,
        window_steps: int = 8,
        teacher_cfg: float = 7.5,
    ) -> tuple[ObjectiveSettings]:
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
        chosen = RECIPES[recipe]
        if recipe == "windows":
            if windows < 1:
                raise ValueError(f"windows must be at least 1, not {windows}; 4 is usual")
            reflow = replace(chosen.reflow, windows=windows, window_steps=window_steps, teacher_cfg=teacher_cfg)
        else:
            dropped = drop_worst if recipe == "fast" else 0.0
            reflow = replace(chosen.reflow, drop_worst=dropped, consistency=consistency)
        weighting = chosen.weighting if weighting == AS_RECIPE else weighting
        return (replace(chosen, caption_dropout=caption_dropout, weighting=weighting, reflow=reflow),)


def _recipe() -> Any:
    return choice(
        tuple(RECIPES),
        "fast",
        "fast: errors by pseudo-Huber (Lee, Lin, Fanti, 'Improving the training of rectified flows', 2024), more"
        " training at both ends of the path (steeper than theirs), the network's own noise error and starting point"
        " kept ('Rectified Diffusion', 2024), the worst pairs left out ('Re-MeanFlow', 2025); the best for 1 to 4 steps, and its LoRA"
        " works in any sampler. paper: 1-rectified flow as in 'Diff2Flow' (CVPR 2025): squared error, all times from"
        " 0 to 1 alike; starts at pure noise. windows: the path in 4 parts, each made straight by the teacher while"
        " training ('PeRFlow', 2024): no pairs on disk, 4 steps or more, slower.",
    )


def _pair_inputs() -> dict[str, Any]:
    return {
        "caption_dropout": number(
            0.1,
            1.0,
            0.05,
            "Share of items trained without their caption, 0 to 1. 0.1 keeps negative prompts and a CFG of 1 to 2"
            " working after reflow; 0 if the LoRA is only used at CFG 1.",
        ),
        "weighting": choice(
            (AS_RECIPE, *WEIGHTINGS),
            AS_RECIPE,
            "Weight of the error over time. recipe: as the recipe has it (fast and windows: eps, paper: velocity)."
            " velocity: more weight on the very start of the path; for recipe fast it makes 1 and 2 steps cleaner."
            " clamped: between the two. eps: every time like the noise error that the checkpoint was trained on.",
        ),
        "drop_worst": number(
            DROPPED,
            0.9,
            0.05,
            "Recipe fast only: share of the pairs that is left out, 0 to 0.9, those whose noise and image lie farthest"
            " apart. 0.1 as in 'Re-MeanFlow'.",
        ),
        "consistency": number(
            0.0,
            1.0,
            0.05,
            "Recipes fast and paper: share of the training steps, the last ones, 0 to 1, in which the network learns to"
            " foresee from every point what it predicts one step later ('Rectified Diffusion', second stage). 0.1 to"
            " 0.3 for 1 step; 0: none.",
        ),
    }


def _window_inputs() -> dict[str, Any]:
    return {
        "windows": count(
            WINDOWS,
            1,
            64,
            "Recipe windows only: parts of the path; sample with as many steps, or a multiple. 4 is usual.",
        ),
        "window_steps": count(
            8, 1, 100, "Recipe windows only: steps of the teacher across a part, each one or two calls of the network."
        ),
        "teacher_cfg": number(
            7.5, 100.0, 0.1, "Recipe windows only: CFG of the teacher, which goes into the LoRA. 7.5 as for the pairs."
        ),
    }
