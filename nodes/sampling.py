"""Nodes that sample Stable Diffusion as a flow."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..hosts.checks import require_finite_latent, require_text_to_image
from ..hosts.choice import PREDICTIONS, START_CHOICES, SWITCH, FlowChoice, flow_of
from ..samplers import SHAPES, SOLVERS
from .effects import tells_the_page
from .errors import names_node
from .widgets import choice, count, number, seed

CATEGORY = "Diff2Flow/sampling"

_START = choice(
    START_CHOICES,
    "auto",
    "Where sampling begins. terminal: at the last timestep that the base model was trained on (right for a checkpoint"
    " as it is). noise: at flow time 0, pure noise (right for a LoRA trained over the full range; repairs black and"
    " white images). auto: what the LoRA's metadata says, terminal without one.",
)
_DENOISE = number(
    1.0,
    1.0,
    0.01,
    "Part of the path that is walked, 0.01 to 1. 1: from noise. Below 1: from the given image with noise"
    " added (image to image); 0.4 to 0.7 keeps the composition. All the steps are spent on that part.",
    minimum=0.01,
    rounding=None,
)
_STEPS = count(
    8,
    1,
    10000,
    "Steps of the solver. A checkpoint as it is wants about 25; a reflowed LoRA 1 to 4; connect"
    " Diff2Flow LoRA Loader's output to use what the LoRA recommends.",
)
_SOLVER = choice(
    SOLVERS,
    "euler",
    "How the path is followed. Network evaluations a step: euler 1, ab2 1, midpoint 2, heun 2, rk4 4 (3 in"
    " the last); dopri5 7 or more, as many as its tolerances ask for: give it 4 to 10 steps. euler is right for straightened"
    " (reflowed) models.",
)


class Diff2FlowModel:
    """Patches a model so that stock samplers treat it as a flow model."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model as a flow model: use it with KSampler (scheduler simple) or SamplerCustom.",)
    SEARCH_ALIASES = (
        "flow matching",
        "rectified flow",
        "model sampling",
        "ModelSamplingSD3",
        "zero terminal snr",
        "black and white images",
    )
    DESCRIPTION = (
        "Turns a Stable Diffusion 1.x, 2.x or SDXL model into a flow matching model for ComfyUI's own samplers, by"
        " Diff2Flow's exact change of time and scale. ControlNet, IP-Adapter, masks and LoRAs keep working."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A Stable Diffusion 1.x, 2.x or SDXL model, with or without LoRAs."}),
                "prediction": choice(
                    PREDICTIONS,
                    "auto",
                    "What the network predicts: eps (SD1.x, SDXL) or v (SD2.x 768, v-pred SDXL)."
                    " auto: as ComfyUI recognised the checkpoint.",
                ),
                "zero_terminal_snr": choice(
                    SWITCH,
                    "auto",
                    "Noise schedule rescaled so that the last timestep is pure noise. auto: as the"
                    " checkpoint says. on: only for v models trained that way. off: the plain schedule.",
                ),
                "start": _START,
                "shift": number(
                    1.0,
                    100.0,
                    0.01,
                    "Time shift, without unit. 1: even steps. Above 1: more steps near the noise"
                    " (composition), 1 to 3 are usual; below 1: more near the image (detail).",
                    minimum=0.01,
                    rounding=None,
                ),
            }
        }

    @names_node("Diff2Flow Model")
    def patch(self, model: Any, prediction: str, zero_terminal_snr: str, start: str, shift: float) -> tuple[Any]:
        return (current().as_chosen_flow(model, FlowChoice(prediction, zero_terminal_snr, start, shift)),)


class Diff2FlowSampler:
    """Samples a model along the aligned flow."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The sampled latents; decode them with VAE Decode.",)
    SEARCH_ALIASES = ("ksampler", "rectified flow", "flow matching", "few steps", "euler ode")
    DESCRIPTION = (
        "Samples a Stable Diffusion model along its flow in even steps of flow time, a whole batch at once, with CFG,"
        " negative prompt, ControlNet, inpainting masks and image to image. Takes a model with or without Diff2Flow"
        " Model."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A Stable Diffusion model; Diff2Flow Model before it is optional."}),
                "positive": ("CONDITIONING", {"tooltip": "What the image should show."}),
                "negative": ("CONDITIONING", {"tooltip": "What it should not show; without effect at CFG 1."}),
                "latent_image": (
                    "LATENT",
                    {
                        "tooltip": "Empty latents give size and batch; an encoded image is varied where denoise"
                        " is below 1."
                    },
                ),
                "seed": seed("Seed of the noise; the same seed gives the same noise as KSampler.", drawn_anew=True),
                "steps": _STEPS,
                "cfg": number(
                    7.0,
                    100.0,
                    0.1,
                    "Classifier-free guidance scale. 5 to 8 for a checkpoint as it is, 1 to 2 for a"
                    " reflowed LoRA; at 1 the negative prompt is not computed and a step costs half.",
                    rounding=0.01,
                ),
                "solver": _SOLVER,
                "denoise": _DENOISE,
                "start": _START,
            }
        }

    @names_node("Diff2Flow Sampler")
    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        seed: int,
        steps: int,
        cfg: float,
        solver: str,
        denoise: float,
        start: str,
    ) -> tuple[Any]:
        sampler = current().solver(solver, rtol=RTOL, atol=ATOL)
        return (sampled(model, positive, negative, latent_image, seed, steps, cfg, sampler, start, denoise),)


RTOL, ATOL = 1e-3, 1e-4


def sampled(
    model: Any,
    positive: Any,
    negative: Any,
    latent_image: Any,
    seed: int,
    steps: int,
    cfg: float,
    sampler: Any,
    start: str,
    denoise: float = 1.0,
) -> Any:
    """LATENT of a model sampled along its flow, in even steps of flow time, by a SAMPLER that knows both sigmas."""
    host = current()
    require_finite_latent(latent_image)
    facts = host.facts(model)
    require_text_to_image(facts, positive)
    flow = flow_of(facts, start)
    clone, sigmas = host.along(model, flow, flow.times(steps, denoise=denoise))
    return host.sample(clone, positive, negative, latent_image, seed, sampler, sigmas, cfg)


@tells_the_page
class Diff2FlowSolver:
    """A SAMPLER for SamplerCustom."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = ("For SamplerCustom, with Diff2Flow Sigmas or any other SIGMAS.",)
    SEARCH_ALIASES = ("ode solver", "euler", "heun", "midpoint", "rk4", "dopri5")
    DESCRIPTION = (
        "The flow ODE solvers as a SAMPLER. They walk in flow time, for a stock model, for one from Diff2Flow Model and"
        " for a native flow model alike."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "solver": _SOLVER,
                "rtol": number(RTOL, 0.1, 1e-7, "dopri5 only: relative error allowed a step.", minimum=1e-7),
                "atol": number(
                    ATOL, 0.1, 1e-7, "dopri5 only: absolute error allowed a step, in latent units.", minimum=1e-7
                ),
            }
        }

    @names_node("Diff2Flow Solver")
    def build(self, solver: str, rtol: float, atol: float) -> tuple[Any]:
        return (current().solver(solver, rtol, atol),)


class Diff2FlowSigmas:
    """SIGMAS of a flow time grid, in the unit that the given model is sampled in."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("SIGMAS",)
    OUTPUT_TOOLTIPS = ("sigma = 1 - t for a model from Diff2Flow Model, sigma = (1 - t)/t for a stock model.",)
    SEARCH_ALIASES = ("scheduler", "timesteps", "time grid", "custom sigmas")
    DESCRIPTION = (
        "The flow's time grid as SIGMAS for SamplerCustom. With a stock model and the stock euler sampler this is"
        " Diff2Flow's Euler: LoRAs trained here need no other node."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The same model that goes into the sampler."}),
                "steps": _STEPS,
                "shape": choice(
                    SHAPES,
                    "uniform",
                    "How the steps are spread over flow time. uniform: evenly; cosine: closer together"
                    " near the noise; u_shaped: closer together at both ends.",
                ),
                "denoise": _DENOISE,
            }
        }

    @names_node("Diff2Flow Sigmas")
    def build(self, model: Any, steps: int, shape: str, denoise: float) -> tuple[Any]:
        facts = current().facts(model)
        flow = flow_of(facts)
        return (flow.sigmas(steps, shape, denoise) if facts.flow else flow.sigmas_k(steps, shape, denoise),)
