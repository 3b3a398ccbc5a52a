"""Complete settings for reflow, each from a paper."""

from __future__ import annotations

from .objective import ObjectiveSettings
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
"""fast: pseudo-Huber and U-shaped times of Lee, Lin, Fanti 2024 (arXiv 2405.20320), the weighting and the terminal
start of a model that keeps eps (Rectified Diffusion, Wang et al. 2024, arXiv 2410.07303), worst pairs left out as in
Re-MeanFlow (arXiv 2511.23342). paper: Diff2Flow's appendix on reflow. windows: PeRFlow (Yan et al. 2024, arXiv
2405.07510)."""
