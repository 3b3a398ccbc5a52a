"""Which flow a model is sampled along: what the user chose, else what its LoRA was trained for, else its schedule."""

from __future__ import annotations

from dataclasses import replace

from ..alignment import Alignment, NaiveFlow
from ..samplers.parameterization import STARTS, FlowParameterization
from .port import HostError, ModelFacts

PREDICTIONS = ("auto", "eps", "v")
SWITCH = ("auto", "on", "off")
START_CHOICES = ("auto", *STARTS)
NOISES = ("fixed", "fresh")
"""Of the frames whose depth is estimated: the same for all, or each its own."""


def choose_flow(
    facts: ModelFacts,
    prediction: str = "auto",
    zero_terminal_snr: str = "auto",
    start: str = "auto",
    shift: float = 1.0,
) -> FlowParameterization:
    """The flow of a model.

    Args:
        facts: what the model is.
        prediction: "eps", "v", or "auto" for what the host samples it with (the velocity itself, unaligned, if the last
            LoRA applied was trained by plain flow matching).
        zero_terminal_snr: "on" rescales the schedule, "off" undoes a rescaled one, "auto": "on" if the last LoRA
            applied was trained so, else as it is.
        start: "noise", "terminal", or "auto": "noise" if a LoRA trained over all of [0, 1] is applied.
        shift: time shift of the default grid, > 0.

    Raises:
        HostError: eps prediction with a zero-terminal-SNR schedule, whose velocity at the start is infinite.
        ValueError: shift not above 0.
    """
    chosen = facts.prediction if prediction == "auto" else prediction
    trained = facts.loras[-1] if facts.loras else {}
    if zero_terminal_snr == "auto" and trained.get("diff2flow.zero_terminal_snr") == "true":
        zero_terminal_snr = "on"
    schedule = facts.schedule.switched(zero_terminal_snr)
    if prediction == "auto" and trained.get("diff2flow.objective") == "flow_matching":
        return FlowParameterization(NaiveFlow(schedule), _start(facts, start), shift)
    if chosen == "eps" and schedule.is_zero_terminal_snr:
        raise HostError(
            "prediction 'eps' cannot be combined with a zero-terminal-SNR schedule (its velocity at the start is"
            " infinite): set zero_terminal_snr to 'off', or prediction to 'v' if the checkpoint is a v-prediction model"
        )
    return FlowParameterization(Alignment(schedule, chosen), _start(facts, start), shift)


def flow_of(facts: ModelFacts, start: str = "auto") -> FlowParameterization:
    """The flow that a model carries already (with `start` overruled where it is not "auto"), else `choose_flow`."""
    if facts.flow is None:
        return choose_flow(facts, start=start)
    return facts.flow if start == "auto" else replace(facts.flow, start=start)


def _start(facts: ModelFacts, start: str) -> str:
    if start != "auto":
        return start
    trained_from_noise = any(lora.get("diff2flow.start") == "noise" for lora in facts.loras)
    return "noise" if trained_from_noise else "terminal"
