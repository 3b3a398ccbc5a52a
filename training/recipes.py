"""Complete settings: for reflow, each from a paper, and for each task that a training can have."""

from __future__ import annotations

from dataclasses import replace

from .objective import ObjectiveSettings
from .port import TrainingDataset
from .reflow_settings import ReflowSettings

DROPPED, WINDOWS = 0.1, 4
RECIPES = {
    "fast": ObjectiveSettings(
        t_range="clamped",
        weighting="eps",
        time_distribution="u_shaped",
        loss="pseudo_huber",
        delta=0.0,
        reflow=ReflowSettings(drop_worst=DROPPED),
    ),
    "paper": ObjectiveSettings(t_range="full", weighting="velocity", time_distribution="uniform", loss="l2"),
    "windows": ObjectiveSettings(t_range="clamped", weighting="eps", reflow=ReflowSettings(windows=WINDOWS)),
}
"""fast: pseudo-Huber of Lee, Lin, Fanti 2024 (arXiv 2405.20320) and U-shaped times, steeper than theirs (see `times`);
the weighting and the terminal start of a model that keeps eps (Rectified Diffusion, Wang et al. 2024, arXiv
2410.07303), worst pairs left out as in Re-MeanFlow (arXiv 2511.23342). paper: Diff2Flow's appendix on reflow. windows:
PeRFlow (Yan et al. 2024, arXiv 2405.07510)."""

_DROPOUT = 0.1
"""Of captions in reflow, as the recipes' node has it."""
EXPERT = "expert"
TASKS = {
    "finetune": ("images", "Diff2Flow Image Dataset"),
    "few_steps": ("reflow pairs", "Diff2Flow Reflow Pairs"),
    "depth": ("images with their depth", "Diff2Flow Depth Dataset"),
}
"""What a task is trained on, and the node that makes it."""
TASK_NAMES = (*TASKS, EXPERT)


def goal_of(task: str, dataset: TrainingDataset, loss: ObjectiveSettings | None) -> ObjectiveSettings:
    """What a task minimises: what was given, else what suits it (few_steps: recipe fast).

    Args:
        task: of TASK_NAMES; "expert" takes any dataset and no settings but its own.
        dataset: trained on.
        loss: given settings, None for none.

    Raises:
        ValueError: an unknown task, or data of another one.
    """
    if task not in TASK_NAMES:
        raise ValueError(f"recipe must be one of {', '.join(TASK_NAMES)}, not {task!r}")
    windows = task == "few_steps" and loss is not None and loss.reflow.windows
    if task != EXPERT and not windows and (fitting := _task_of(dataset)) != task:
        found, (wanted, node) = TASKS[fitting][0], TASKS[task]
        raise ValueError(
            f"recipe '{task}' trains on {wanted}, and '{dataset.name}' has {found}: choose recipe '{fitting}', or"
            f" connect {node} to dataset"
        )
    if loss is not None:
        return loss
    return replace(RECIPES["fast"], caption_dropout=_DROPOUT) if task == "few_steps" else ObjectiveSettings()


def _task_of(dataset: TrainingDataset) -> str:
    return "few_steps" if dataset.has_noise else "depth" if dataset.image_channels else "finetune"
