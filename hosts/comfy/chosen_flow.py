"""A flow that is found when sampling begins, from all LoRAs that are then on a ModelPatcher."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...samplers.parameterization import FlowParameterization
from ..choice import FlowChoice
from ..port import HostError
from . import models, recognition
from .image_input import show_image
from .sampling import TABLE, FlowModelSampling, warn_of_timed_patches

_KEY = "diff2flow.chosen_flow"
"""Of the callback by which a clone of a ModelPatcher gets its own model sampling."""


class ChosenFlowSampling(FlowModelSampling):
    """ComfyUI's `model_sampling` whose flow follows from a choice and from the LoRAs on one ModelPatcher.

    ComfyUI rebuilds such objects as type(original)(model_config), so both are bound to a subclass (`_bound`).
    """

    choice: FlowChoice
    stock: Any
    """The model sampling that it stands for: how the host itself samples the model."""
    by_node: bool
    """Whether a node put that in place."""
    owner: weakref.ref[Any]

    def __init__(self, model_config: Any = None) -> None:
        torch.nn.Module.__init__(self)
        self.set_parameters(self.choice.shift)
        self._known: tuple[Any, FlowParameterization, Tensor] | None = None

    def set_parameters(self, shift: float = 1.0, multiplier: float = 1000.0) -> None:
        """Sets the time shift; `multiplier` is kept for ComfyUI, the timestep does not depend on it."""
        self.shift, self.multiplier = shift, multiplier

    @property
    def diff2flow(self) -> FlowParameterization:  # type: ignore[override]
        """The flow, as the LoRAs are now."""
        return self._found()[0]

    @property
    def sigmas(self) -> Tensor:
        """Ascending table (T,) float32, for schedulers."""
        return self._found()[1]

    def _found(self) -> tuple[FlowParameterization, Tensor]:
        """Flow and table; HostError, which names the node, where the LoRAs allow none."""
        owner = self.owner()
        state = None if owner is None else (owner.patches_uuid, recognition.said_by_nodes(owner), self.shift)
        if self._known is None or (state is not None and state != self._known[0]):
            flow = self._flow(owner)
            self._known = (state, flow, flow.sigmas(TABLE)[:-1].flip(0))
        return self._known[1:]

    def _flow(self, owner: Any) -> FlowParameterization:
        if owner is None:
            raise HostError("Diff2Flow Model: the model that it was applied to is gone; run the workflow again")
        try:
            facts = models.stock_facts(owner, self.stock, self.by_node)
            return FlowChoice(
                self.choice.prediction, self.choice.zero_terminal_snr, self.choice.start, self.shift
            ).flow(facts)
        except ValueError as error:
            raise HostError(f"Diff2Flow Model: {error}") from error


def as_chosen_flow(model: Any, choice: FlowChoice) -> Any:
    """A clone of the ModelPatcher that is sampled in sigma_flow; the original stays as it is.

    Patches that were made in sigma_k are named in a warning: their limits cannot be told to them anew.
    """
    before = model.get_model_object("model_sampling")
    warn_of_timed_patches(model)
    clone = model.clone()
    if isinstance(before, ChosenFlowSampling):
        choice, stock, by_node = choice.after(before.choice), before.stock, before.by_node
    else:
        stock, by_node = before, models.is_patched(model)
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLONE, _KEY)
    clone.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _follow)
    sampling = _bound(choice, stock, by_node, clone)
    sampling.diff2flow  # noqa: B018  (raises what cannot be)
    clone.add_object_patch("model_sampling", sampling)
    if models.sees_image(clone):
        show_image(clone)
    return clone


def _bound(choice: FlowChoice, stock: Any, by_node: bool, owner: Any) -> ChosenFlowSampling:
    parts = {"choice": choice, "stock": stock, "by_node": by_node, "owner": weakref.ref(owner)}
    return type("Diff2FlowModelSampling", (ChosenFlowSampling,), parts)()


def _follow(model: Any, clone: Any) -> None:
    """A clone has LoRAs of its own: ComfyUI copies the model sampling by reference."""
    sampling = clone.object_patches.get("model_sampling")
    if not isinstance(sampling, ChosenFlowSampling):
        return
    own = _bound(sampling.choice, sampling.stock, sampling.by_node, clone)
    own.set_parameters(sampling.shift, sampling.multiplier)
    own.noise_scale = sampling.noise_scale
    clone.object_patches["model_sampling"] = own
