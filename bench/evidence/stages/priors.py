"""The priors that everything else is measured on: trained once, kept in the models folder."""

from __future__ import annotations

import math
from typing import Any

from ... import tiny_prior
from ...ldm_layout import UNET_PREFIX
from ..section import Section, Table
from ..stage import Context, Result, Stage

DIGITS = {"quick": "quick", "normal": "digits", "full": "bench"}
SCENES = {"quick": "scenes_quick", "normal": "scenes_short", "full": "scenes"}
SHAPES = {"quick": "shapes_quick", "normal": "shapes", "full": "shapes"}
"""Qualities of `tiny_prior` by kind of run: everything is reckoned at two hours of two cores."""


def digits_prior(context: Context) -> str:
    """Quality of the prior of digits."""
    return DIGITS[context.kind]


def scenes_prior(context: Context) -> str:
    """Quality of the prior of scenes."""
    return SCENES[context.kind]


def shapes_prior(context: Context) -> str:
    """Quality of the prior of flat shapes."""
    return SHAPES[context.kind]


def run_digits(context: Context) -> Result:
    """Trains the prior of digits where there is none."""
    return _made(digits_prior(context), context)


def run_scenes(context: Context) -> Result:
    """Trains the prior of scenes where there is none."""
    return _made(scenes_prior(context), context)


def run_shapes(context: Context) -> Result:
    """Trains the prior of flat shapes where there is none."""
    return _made(shapes_prior(context), context)


def _made(quality: str, context: Context) -> Result:
    from safetensors import safe_open

    path = tiny_prior.ensure_narrow(quality, context.models)
    with safe_open(str(path), framework="pt") as file:
        known = {key: text for key, text in (file.metadata() or {}).items() if key.startswith("diff2flow.")}
        keys = [key for key in list(file.keys()) if key.startswith(UNET_PREFIX)]
        shapes = [file.get_slice(key).get_shape() for key in keys]
    about = tiny_prior.QUALITIES[quality]
    return {
        "quality": quality,
        "unet_parameters": sum(map(math.prod, shapes)),
        "unet_steps": about.unet.steps,
        "rounds_at_most": about.rounds,
        "measured": {key.removeprefix("diff2flow."): text for key, text in known.items() if text and _is_number(text)},
        "numbers": {},
    }


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit() and "." in text


def render(result: Result) -> Section:
    """What it is, and what was measured when it was made."""
    measured = [f"{name.replace('_', ' ')} {value}" for name, value in result["measured"].items()]
    row: tuple[Any, ...] = (
        result["quality"],
        f"{result['unet_parameters'] / 1e6:.2f} M",
        f"{result['unet_steps']} (at most {result['rounds_at_most']} times)",
        "; ".join(measured) or "-",
    )
    return Section((), (Table("", ("quality", "weights of the UNet", "training steps", "measured"), [row]),))


def _digits_settings(context: Context) -> dict[str, str]:
    return {"quality": digits_prior(context)}


def _scenes_settings(context: Context) -> dict[str, str]:
    return {"quality": scenes_prior(context)}


def _shapes_settings(context: Context) -> dict[str, str]:
    return {"quality": shapes_prior(context)}


STAGES = (
    Stage(
        "prior_digits", "Handwritten digits", 0, (13.0, 1.2), run_digits, render,
        settings=_digits_settings,
    ),
    Stage(
        "prior_scenes", "Synthetic scenes, for depth", 0, (13.0, 1.2), run_scenes, render,
        settings=_scenes_settings,
    ),
    Stage(
        "prior_shapes", "Flat coloured shapes, for what captions ask for", 0, (15.0, 1.2), run_shapes, render,
        settings=_shapes_settings,
    ),
)  # fmt: skip
