"""Nodes that show how straight a model's paths are."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..hosts.choice import START_CHOICES
from ..samplers import SOLVERS
from .errors import names_node
from .sampling import ATOL, RTOL, sampled
from .widgets import choice, count, listed_numbers, number, seed, text

_CATEGORY = "Diff2Flow/evaluation"


def _sampling_inputs() -> dict[str, Any]:
    return {
        "model": ("MODEL", {"tooltip": "A Stable Diffusion model, with or without LoRAs and Diff2Flow Model."}),
        "positive": ("CONDITIONING", {"tooltip": "What the images should show."}),
        "negative": ("CONDITIONING", {"tooltip": "What they should not show; without effect at CFG 1."}),
        "latent_image": ("LATENT", {"tooltip": "Empty latents: their size, and how many images there are."}),
        "seed": seed("Seed of the noise, the same as in any KSampler."),
        "cfg": number(7.0, 100.0, 0.1, "CFG, as you sample with: 5 to 8 for a checkpoint, 1 to 2 for a reflowed LoRA."),
    }


def _start() -> Any:
    return choice(
        START_CHOICES,
        "auto",
        "Where sampling begins: terminal for a checkpoint as it is, noise for a LoRA trained over the full range, auto"
        " for what the LoRA says.",
    )


class Diff2FlowStraightness:
    """Measures how far a model's sampling paths are from straight lines."""

    CATEGORY = _CATEGORY
    FUNCTION = "measure"
    RETURN_TYPES = ("FLOAT", "FLOAT", "IMAGE", "STRING", "LATENT")
    RETURN_NAMES = ("straightness", "relative", "plot", "report", "latent")
    OUTPUT_TOOLTIPS = (
        "How far the velocity on the way is from that of the straight line: mean squared error along the paths, in"
        " squared latent units; 0 is straight.",
        "The same as a part of the squared distance between noise and image, without unit; 0 is straight.",
        "Where along the flow time the paths bend.",
        "Both numbers in words.",
        "The images at the ends of the paths.",
    )
    SEARCH_ALIASES = ("measure straightness", "path curvature", "rectified flow")
    DESCRIPTION = (
        "Walks the model's own paths in many small steps and compares the velocity on the way with that of the straight"
        " line between noise and result. The straighter, the fewer steps are enough: compare a checkpoint with its"
        " reflowed LoRA at the CFG that each is used with."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = count(50, 2, 1000, "Steps of each path; 25 to 100. More see finer bends and take longer.")
        return {"required": {**_sampling_inputs(), "steps": steps}, "optional": {"start": _start()}}

    @names_node("Diff2Flow Straightness")
    def measure(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        seed: int,
        cfg: float,
        steps: int,
        start: str = "auto",
    ) -> tuple[float, float, Any, str, Any]:
        from ..samplers.straightness import PathMeter
        from ..training.plot import straightness_plot

        host = current()
        meter = PathMeter(host.speaks_flow)
        sampler = host.sampler(meter, {})
        latent = sampled(model, positive, negative, latent_image, seed, steps, cfg, sampler, start)
        found = meter.found
        report = f"straightness {found.mean:.4g} ({100 * found.relative:.3g} % of the speed squared) over {steps} steps"
        return found.mean, found.relative, straightness_plot(found), report, latent


class Diff2FlowStepsGrid:
    """Draws the same seeds in several numbers of steps, side by side."""

    CATEGORY = _CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("One picture: a column for each number of steps, a row for each image of the batch.",)
    SEARCH_ALIASES = ("few steps", "compare steps", "xy plot", "image grid")
    DESCRIPTION = (
        "Samples the same noise in 1, 2, 4, 8, 25 steps and puts the results side by side in one picture: what a"
        " reflowed LoRA is good for, at a glance."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        vae = {"vae": ("VAE", {"tooltip": "Decodes the images: the autoencoder of the checkpoint."})}
        steps = text("1, 2, 4, 8, 25", "Numbers of steps with commas between, a column each; 1 to 10000.")
        solver = choice(tuple(SOLVERS), "euler", "How the paths are followed; euler for reflowed models.")
        return {
            "required": {**_sampling_inputs(), **vae, "step_counts": steps},
            "optional": {"solver": solver, "start": _start()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, step_counts: str | None = None) -> bool | str:
        """Checked before anything is loaded; None where the input is linked."""
        try:
            return step_counts is None or bool(listed_numbers(step_counts, "step_counts"))
        except ValueError as error:
            return str(error)

    @names_node("Diff2Flow Steps Grid")
    def draw(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        seed: int,
        cfg: float,
        vae: Any,
        step_counts: str,
        solver: str = "euler",
        start: str = "auto",
    ) -> tuple[Any]:
        from ..training.side_by_side import side_by_side

        host = current()
        sampler = host.solver(solver, RTOL, ATOL)
        columns = []
        for steps in listed_numbers(step_counts, "step_counts"):
            latent = sampled(model, positive, negative, latent_image, seed, steps, cfg, sampler, start)
            title = "1 step" if steps == 1 else f"{steps} steps"
            columns.append((title, host.decode_image(vae, latent["samples"])))
        return (side_by_side(columns),)
