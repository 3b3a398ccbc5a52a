"""The image that a network with a depth LoRA looks at, handed to it by ComfyUI's own conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from comfy.patcher_extension import WrappersMP

from ..port import HostError

_KEY = "diff2flow.image"


def show_image(model: Any) -> None:
    """Has a ModelPatcher put the conditioning's "concat_latent_image", scaled, behind the noisy latent.

    Diff2Flow Depth brings it, and so does the stock InstructPixToPixConditioning for stock samplers.
    """
    model.add_object_patch("concat_keys", ("concat_image",))
    model.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, _KEY)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _KEY, _with_image)


def _with_image(execute: Callable[..., Any], model: Any, conds: Sequence[Any], *rest: Any) -> Any:
    """ComfyUI's call of the network; without an image it would show the network the sampled latent instead.

    Raises:
        HostError: a condition that brings no image.
    """
    if any("concat_latent_image" not in each for cond in conds for each in cond or ()):
        raise HostError(
            "the model looks at an image (a depth LoRA is on it), and the conditioning brings none; use Diff2Flow"
            " Depth, put InstructPixToPixConditioning before the sampler, or remove the LoRA"
        )
    return execute(model, conds, *rest)
