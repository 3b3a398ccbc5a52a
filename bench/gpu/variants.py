"""What might make a step or a pair faster, each beside the way it is now, in turns: it tells what is worth keeping."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...training.adapters import trainable
from ...training.layers import PRESETS
from ..costs import interleaved, medians, ratios, seconds_on
from ..random_backbone import RandomBackbone, square_sizes
from ..training_steps import StepClock, bare_steps
from .setting import Setting, emptied, tf32
from .steps import CASTS, conditioning

_BATCH, _WARM_UP, _STEPS = 4, 2, 6
_COMPILING = 150.0
"""Seconds that must be left before a network of full size is compiled."""
Way = Callable[[], float]
Around = Callable[[], AbstractContextManager[Any]]


def steps(setting: Setting) -> None:
    """A training step: memory layout, optimizer, text embeddings on the card; TF32 for float32."""
    family, half = "SD1.5", torch.float32 if setting.small else torch.float16
    with emptied():
        backbone = setting.backbone(family, half)
        setting.findings.case("step", partial(_steps_in_half, setting, backbone), family=family, of="step")
        del backbone
    with emptied():
        backbone = setting.backbone(family, torch.float32)
        run = partial(_steps_in_full, setting, backbone)
        setting.findings.case("step in float32", run, family=family, of="fp32 step")


def compiled(setting: Setting) -> None:
    """A training step through torch.compile, as it is by default and for one shape only; the call of pair making."""
    if setting.small:
        setting.findings.skip("compiled", "compiling takes a minute; a test of its own does it on the CPU")
        return
    with emptied():
        backbone, about = setting.backbone("SD1.5", torch.float16), {"family": "SD1.5"}
        for name, measure in (
            ("compiled step", partial(_steps_compiled, setting, backbone)),
            ("compiled pair call", partial(_calls_compiled, setting, backbone, _BATCH)),
        ):
            if setting.findings.left < _COMPILING:
                setting.findings.skip(name, "too little time is left")
                continue
            setting.findings.case(name, measure, of=name, **about)
        del backbone


def pairs(setting: Setting) -> None:
    """The CFG-batched call of pair making: memory layout, and the same call replayed from a CUDA graph."""
    half = torch.float32 if setting.small else torch.float16
    with emptied():
        backbone, other = (setting.backbone("SD1.5", half) for _ in range(2))
        with channels_last(other.module):
            for count in (1,) if setting.small else (1, 4, 16):
                about = {"family": "SD1.5", "of": "pair call", "pairs": count}
                run = partial(_calls, setting, backbone, other, count)
                setting.findings.case(f"call for {count} pairs", run, **about)
        del backbone, other


def _steps_in_half(setting: Setting, backbone: RandomBackbone) -> dict[str, Any]:
    side = setting.side("SD1.5")
    given, at_home = (conditioning(backbone, _BATCH, side), _on_cpu(backbone, _BATCH, side))
    with trainable(backbone, PRESETS["light"], 0) as adapters:
        step = _Step(setting, backbone, adapters.parameters())
        ways = {
            "as it is": step.way(at_home),
            "text on the card": step.way(given),
            "AdamW foreach": step.way(at_home, fused=False),
            "channels_last": step.way(at_home, around=partial(channels_last, backbone.module)),
        }
        return _turns(setting, ways)


def _steps_in_full(setting: Setting, backbone: RandomBackbone) -> dict[str, Any]:
    given = conditioning(backbone, _BATCH, setting.side("SD1.5"))
    with trainable(backbone, PRESETS["light"], 0) as adapters:
        step = _Step(setting, backbone, adapters.parameters(), cast=None)
        ways = {name: step.way(given, around=partial(tf32, on)) for name, on in (("as it is", False), ("TF32", True))}
        return _turns(setting, ways)


def _steps_compiled(setting: Setting, backbone: RandomBackbone) -> dict[str, Any]:
    given = conditioning(backbone, _BATCH, setting.side("SD1.5"))
    with trainable(backbone, PRESETS["light"], 0) as adapters:
        step = _Step(setting, backbone, adapters.parameters())
        ways = {
            "as it is": step.way(given),
            "compiled": step.way(given, around=_compiler(backbone.module)),
            "compiled for one shape": step.way(given, around=_compiler(backbone.module, dynamic=False)),
        }
        return _turns(setting, ways)


class _Step:
    """Makes ways to train a network that is ready for it."""

    def __init__(
        self,
        setting: Setting,
        backbone: RandomBackbone,
        parameters: list[nn.Parameter],
        cast: torch.dtype | None = CASTS["bf16"],
    ) -> None:
        self._small, self._backbone, self._parameters, self._cast = setting.small, backbone, parameters, cast
        self._shape = (_BATCH, 4, setting.side("SD1.5") // 8, setting.side("SD1.5") // 8)

    def way(self, given: Mapping[str, Tensor], fused: bool = True, around: Around = nullcontext) -> Way:
        """Median seconds of a step, after some that do not count.

        Args:
            given: what the network takes beside x and tau; moved to the device in every step where it is not there.
            fused: whether AdamW is one kernel.
            around: in which context.
        """

        def run() -> float:
            with around(), StepClock(self._backbone.device.type) as clock:
                bare_steps(
                    lambda x, tau: self._backbone(x, tau, given),
                    self._parameters,
                    self._shape,
                    2 if self._small else 1 + _WARM_UP + _STEPS,
                    self._cast,
                    fused,
                )
            return statistics.median(clock.intervals()[0 if self._small else _WARM_UP :])

        return run


def _turns(setting: Setting, ways: Mapping[str, Way]) -> dict[str, Any]:
    """Median seconds of each way over rounds in turns, and the ratio to the first."""
    seconds = interleaved(ways, 1 if setting.small else 3, warm_up=not setting.small)
    return {"median_seconds": medians(seconds), **ratios(seconds, next(iter(ways)))}


def _calls(setting: Setting, backbone: RandomBackbone, other: RandomBackbone, count: int) -> dict[str, Any]:
    """Seconds of the network's call for so many pairs with CFG; `other` keeps its weights channels last."""
    call = _call(setting, backbone, count)
    ways = {"as it is": call, "channels_last": _call(setting, other, count)}
    if backbone.device.type == "cuda":
        ways["CUDA graph"] = _replayed(call)
    return _timed_calls(setting, ways)


def _calls_compiled(setting: Setting, backbone: RandomBackbone, count: int) -> dict[str, Any]:
    """The same through torch.compile with its own CUDA graphs."""
    call = _call(setting, backbone, count)
    around = _compiler(backbone.module, mode="reduce-overhead", dynamic=False)

    def through() -> None:
        with around():
            call()

    return _timed_calls(setting, {"as it is": call, "reduce-overhead": through})


def _call(setting: Setting, backbone: RandomBackbone, count: int) -> Callable[[], Any]:
    """The network's call for so many pairs with CFG."""
    side, device = setting.side("SD1.5"), backbone.device
    x = torch.randn(2 * count, 4, side // 8, side // 8, device=device)
    tau, given = torch.full((2 * count,), 500.0, device=device), conditioning(backbone, 2 * count, side)

    @torch.no_grad()
    def call() -> Tensor:
        return backbone(x, tau, given)

    return call


def _timed_calls(setting: Setting, ways: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Seconds of one call of each way, over rounds of many."""
    many, timed = 1 if setting.small else 10, seconds_on(setting.device.type)
    found = _turns(setting, {name: timed(partial(_repeated, way, many)) for name, way in ways.items()})
    found["median_seconds"] = {name: each / many for name, each in found["median_seconds"].items()}
    return found


def _repeated(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def _replayed(call: Callable[[], Tensor]) -> Callable[[], None]:
    """The call as a CUDA graph, which reads and writes the same memory every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def channels_last(module: nn.Module) -> Iterator[None]:
    """The network's convolutions keep their weights channels last."""
    module.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        module.to(memory_format=torch.contiguous_format)


def _compiler(module: nn.Module, **options: Any) -> Around:
    """Contexts in which the network is compiled, all of them by the same compilation."""
    kept: list[Any] = []

    @contextmanager
    def around() -> Iterator[None]:
        if kept:
            module._compiled_call_impl = kept[0]
        else:
            module.compile(**options)
            kept.append(module._compiled_call_impl)
        try:
            yield
        finally:
            module._compiled_call_impl = None

    return around


def _on_cpu(backbone: RandomBackbone, batch: int, side: int) -> Mapping[str, Tensor]:
    """What the network takes beside x and tau, as a dataset hands it out."""
    return backbone.conditioning(*backbone.texts(batch), square_sizes(batch, side))
