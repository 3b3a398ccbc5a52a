"""Which flow a model is sampled along: what the user chose, else what its LoRA was trained for, else its schedule."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

from ..alignment import Alignment, NaiveFlow
from ..samplers.parameterization import STARTS, FlowParameterization
from .port import HostError, ModelFacts, Said

logger = logging.getLogger(__name__)

PREDICTIONS = ("auto", "eps", "v")
SWITCH = ("auto", "on", "off")
START_CHOICES = ("auto", *STARTS)
NOISES = ("fixed", "fresh")
"""Of the frames whose depth is estimated: the same for all, or each its own."""

_NAIVE = "flow_matching"


@dataclass(frozen=True)
class FlowChoice:
    """What the user chose of a flow. The rest is found when sampling begins, from all LoRAs that are then on the model.

    Args:
        prediction, zero_terminal_snr, start, shift: see `choose_flow`.
    """

    prediction: str = "auto"
    zero_terminal_snr: str = "auto"
    start: str = "auto"
    shift: float = 1.0

    def flow(self, facts: ModelFacts) -> FlowParameterization:
        """The flow of a model that these are the facts of; raises what `choose_flow` raises."""
        return choose_flow(facts, self.prediction, self.zero_terminal_snr, self.start, self.shift)

    def after(self, earlier: FlowChoice | None) -> FlowChoice:
        """This choice on a model that has another already, whose prediction and schedule stay where this says auto."""
        if earlier is None:
            return self
        kept = {
            name: getattr(earlier, name)
            for name in ("prediction", "zero_terminal_snr")
            if getattr(self, name) == "auto"
        }
        return replace(self, **kept)


def choose_flow(
    facts: ModelFacts,
    prediction: str = "auto",
    zero_terminal_snr: str = "auto",
    start: str = "auto",
    shift: float = 1.0,
) -> FlowParameterization:
    """The flow of a model.

    Where LoRAs differ, the last applied counts for objective and schedule; that is logged.

    Args:
        facts: what the model is.
        prediction: "eps", "v", or "auto" for what the host samples it with (the velocity itself, unaligned, if the last
            Diff2Flow LoRA applied was trained by plain flow matching).
        zero_terminal_snr: "on" rescales the schedule, "off" undoes a rescaled one, "auto": "on" if the last Diff2Flow
            LoRA applied was trained so, else as it is.
        start: "noise", "terminal", or "auto": "noise" if a LoRA trained over all of [0, 1] is applied.
        shift: time shift of the default grid, > 0.

    Raises:
        HostError: eps prediction with a zero-terminal-SNR schedule, whose velocity at the start is infinite.
        ValueError: shift not above 0.
    """
    chosen = facts.prediction if prediction == "auto" else prediction
    trained = last_trained(facts)
    if zero_terminal_snr == "auto" and trained.get("diff2flow.zero_terminal_snr") == "true":
        zero_terminal_snr = "on"
    schedule = facts.schedule.switched(zero_terminal_snr)
    if prediction == "auto":
        _tell_different_objectives(facts)
    if prediction == "auto" and trained.get("diff2flow.objective") == _NAIVE:
        return FlowParameterization(NaiveFlow(schedule), _start(facts, start), shift)
    if chosen == "eps" and schedule.is_zero_terminal_snr:
        raise HostError(_eps_without_signal(facts, trained))
    return FlowParameterization(Alignment(schedule, chosen), _start(facts, start), shift)


def flow_of(facts: ModelFacts, start: str = "auto") -> FlowParameterization:
    """The flow that a model carries already (with `start` overruled where it is not "auto"), else `choose_flow`."""
    if facts.flow is None:
        return choose_flow(facts, start=start)
    return facts.flow if start == "auto" else replace(facts.flow, start=start)


def as_trained(facts: ModelFacts, chosen_by_node: bool = False) -> ModelFacts:
    """The facts with the prediction type that the last Diff2Flow LoRA was trained on, where that is certain.

    It is where the LoRA was trained on this very checkpoint and no node has chosen another: the host was not told then
    that it is a v model. Otherwise a LoRA of another prediction type is named in the log.

    Args:
        facts: what the host says.
        chosen_by_node: whether a node has chosen how the model predicts.
    """
    trained = last_trained(facts)
    wanted = trained.get("diff2flow.prediction", "")
    if wanted in ("", facts.prediction) or trained.get("diff2flow.objective") == _NAIVE:
        return facts
    base = trained.get("diff2flow.base_name", "")
    if base and base == facts.base_name and not chosen_by_node:
        return replace(facts, prediction=wanted)
    say_once(
        f"the LoRA {_title(trained)!r} was trained on a {wanted} model{f' ({base})' if base else ''}, and this"
        f" {facts.family} model is sampled as {facts.prediction}: {_WAY_OUT[wanted]}"
    )
    return facts


_WAY_OUT = {
    "v": "if the checkpoint is a v-prediction model, put ModelSamplingDiscrete (v_prediction) behind its loader or"
    " choose prediction 'v' in Diff2Flow Model; else choose a LoRA trained for it",
    "eps": "if the checkpoint is an eps model, take out the node that makes it another or choose prediction 'eps' in"
    " Diff2Flow Model; else choose a LoRA trained for it",
    "x0": "put ModelSamplingDiscrete (x0) behind its loader, or choose a LoRA trained for this model",
}
"""What to do about a LoRA that was trained on another prediction type than the model has."""


def last_trained(facts: ModelFacts) -> Said:
    """What the last Diff2Flow LoRA applied says, else the checkpoint if Diff2Flow made it, else {}."""
    return next((lora for lora in facts.loras[::-1] if _is_ours(lora)), {})


def tell_lost_prediction(name: str) -> None:
    """A checkpoint without the mark of its v prediction (`training.checkpoint_file.Marks`) is named in the log."""
    say_once(
        f"'{name}' was saved by ComfyUI behind ModelSamplingDiscrete (v_prediction), which the file does not keep, and"
        " is taken for eps: put that node behind its loader again; Diff2Flow Save Checkpoint keeps it"
    )


@lru_cache(maxsize=256)
def say_once(sentence: str) -> None:
    """Logs a warning, the first time that it is said: flows are asked for in every step."""
    logger.warning("%s", sentence)


def _is_ours(lora: Said) -> bool:
    return any(key.startswith("diff2flow.") for key in lora)


def _title(lora: Said) -> str:
    return lora.get("modelspec.title", "")


def _tell_different_objectives(facts: ModelFacts) -> None:
    """A LoRA of plain flow matching makes another kind of network than all others: both cannot be right."""
    loras = [each for each in facts.loras if "diff2flow.objective" in each]
    if len({each["diff2flow.objective"] == _NAIVE for each in loras}) < 2:
        return
    names = " and ".join(f"{_title(each)!r} (objective {each['diff2flow.objective']})" for each in loras)
    say_once(
        f"the model carries {names}: one network cannot be both, and it is sampled as the last of them; remove the"
        " others unless it was trained on top of them"
    )


def _eps_without_signal(facts: ModelFacts, trained: Said) -> str:
    if trained.get("diff2flow.prediction") == "v" and facts.prediction == "eps":
        return (
            f"the LoRA {_title(trained)!r} was trained on a v-prediction model with zero terminal SNR, and this"
            f" {facts.family} model is sampled as eps: {_WAY_OUT['v']}"
        )
    return (
        "prediction 'eps' cannot be combined with a zero-terminal-SNR schedule (its velocity at the start is"
        " infinite): set zero_terminal_snr to 'off', or prediction to 'v' if the checkpoint is a v-prediction model"
    )


def _start(facts: ModelFacts, start: str) -> str:
    if start != "auto":
        return start
    trained_from_noise = any(lora.get("diff2flow.start") == "noise" for lora in facts.loras)
    return "noise" if trained_from_noise else "terminal"
