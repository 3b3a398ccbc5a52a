"""A diffusion network that makes latents of noise: its own ODE with CFG, one network call an evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..samplers import SOLVERS, integrate
from ..samplers.parameterization import FlowParameterization
from .conditioning import on_device
from .memory import free_memory, is_out_of_memory, release
from .port import Backbone
from .transfer import to_device

_LOG = logging.getLogger(__name__)
RTOL, ATOL = 1e-3, 1e-4
"""Of dopri5. They are no part of what identifies pairs: with others, raise `reflow._FORMAT`."""
AUTO_LIMIT = 64
"""The largest batch that is chosen by itself: larger ones are hardly faster, and more is lost when one is killed."""
_AUTO_CPU, _TRIAL = 4, 8
_USED = 0.85
"""Part of the free memory that a batch may take."""
_EARLY, _FAR = 0.5, 1.3
"""A batch is given up before this part of it is done, where it will take so many times longer than it may."""


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher samples.

    Args:
        steps: of the solver, at least 1.
        cfg: guidance scale, at least 0; at 1 the negative is not computed.
        solver: of `samplers.SOLVERS`; dopri5 keeps its tolerances for the batch as a whole.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 40
    cfg: float = 7.5
    solver: str = "euler"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}; 25 to 40 is usual")
        if not 0.0 <= self.cfg < math.inf:
            raise ValueError(f"cfg must be at least 0, not {self.cfg}; 7.5 is usual")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")

    @property
    def is_guided(self) -> bool:
        """Whether the negative is computed."""
        return not math.isclose(self.cfg, 1.0)


class Teacher:
    """Solves dx/dt = velocity from noise to data.

    Args:
        backbone: the network, with everything that is patched into it.
        flow: along which flow, and where it begins.
        settings: how.
    """

    def __init__(self, backbone: Backbone, flow: FlowParameterization, settings: TeacherSettings) -> None:
        self._backbone, self._flow, self._settings = backbone, flow, settings
        self._times = flow.times(settings.steps)

    @torch.no_grad()
    def __call__(
        self,
        x_noise: Tensor,
        context: Tensor | tuple[Tensor, Tensor],
        pooled: Tensor | None,
        sizes: Tensor,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Latents (B, C, h, w) on the CPU, float32, in the autoencoder's scale.

        The path begins at x_flow(t_start): x_noise at t = 0, n(t_min) x_noise for a base model (DESIGN trap 4). Either
        way x_noise is the pair's noise, the end of the straight line at t = 0.

        Args:
            x_noise: (B, C, h, w) float32.
            context: (2B, tokens, width), the positives before the negatives; (B, tokens, width) without guidance.
                Where the two have other lengths, a tuple of both: each then has a network call of its own, as in
                ComfyUI's sampler, which never pads one by the other.
            pooled: (2B, width) or (B, width), or None.
            sizes: (2B, 6) or (B, 6), see `Backbone.conditioning`.
            on_step: called after each step; what it raises ends the sampling.

        Raises:
            NonFiniteStateError: the latents became NaN or infinite.
        """
        self._backbone.ready()
        x_noise = to_device(x_noise, self._backbone.device)
        calls = self._calls(context, pooled, sizes)
        start = (1.0 - self._times[0]).to(x_noise.dtype)
        state = self._flow.noisy(start, x_noise, torch.zeros_like(x_noise), at_start=True)
        made = integrate(
            lambda x, t: self._velocity(x, t, calls),
            state,
            self._times,
            self._settings.solver,
            lambda *step: on_step(),
            rtol=RTOL,
            atol=ATOL,
            pole=1.0,  # as Diff2Flow Sampler ends, so that a pair's picture is what that draws
        )
        return self._backbone.unscale_latent(made).float().cpu()

    def _calls(
        self, context: Tensor | tuple[Tensor, Tensor], pooled: Tensor | None, sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        """What the network takes in each of its calls: one where all contexts have one length."""
        contexts = [context] if isinstance(context, Tensor) else list(context)
        count = len(contexts)
        outputs = [None] * count if pooled is None else pooled.chunk(count)
        parts = zip(contexts, outputs, sizes.chunk(count), strict=True)
        return [on_device(self._backbone, *part) for part in parts]

    def _velocity(self, x: Tensor, t: Tensor, calls: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """velocity (B, C, h, w) at x, t (): the conditional and the unconditional output from as few calls as go."""
        alignment, count = self._flow.alignment, 2 if self._settings.is_guided else 1
        x_diff = alignment.to_diffusion(x, t).repeat(count // len(calls), 1, 1, 1)
        tau = alignment.timestep(t).expand(len(x_diff))
        output = torch.cat([self._backbone(x_diff, tau, conditioning).float() for conditioning in calls])
        if count == 2:
            positive, negative = output.chunk(2)
            output = negative + self._settings.cfg * (positive - negative)
        return alignment.velocity(output, x, t)


class TooSlowError(Exception):
    """A batch would take longer than may be lost; it is made again in parts."""


class BatchSize:
    """How many items go into one batch: what was asked for, or what fits; less after the memory ran out, and where a
    batch would take too long.

    Args:
        asked: items; 0 finds the largest number that fits, `AUTO_LIMIT` at most (4 on the CPU, where more is not
            faster).
        device: of the network.
        seconds: that a batch of more than one item may take.
    """

    def __init__(self, asked: int, device: torch.device, seconds: float = math.inf) -> None:
        self._device, self._seconds = device, seconds
        self._limit = asked or (AUTO_LIMIT if device.type == "cuda" else _AUTO_CPU)
        self._grows = not asked and device.type == "cuda"
        self.now = 1 if self._grows else self._limit
        self._in_time = min(self._limit, _TRIAL) if math.isfinite(seconds) else self._limit
        self._began, self._items, self._each = time.monotonic(), 0, 0.0

    def run(self, batch: Callable[[int], int]) -> int:
        """Runs a batch of at most `now` items, again with fewer while memory runs out or it is too slow.

        Args:
            batch: makes at most so many items and returns how many it made.

        Returns:
            What `batch` returned.

        Raises:
            RuntimeError: memory runs out with a single item (`memory.is_out_of_memory`).
        """
        while True:
            before, made = self._watched(), None
            self._began, self._items = time.monotonic(), min(self.now, self._in_time)
            try:
                made = batch(self._items)
            except TooSlowError:
                continue
            except RuntimeError as error:
                if self._items == 1 or not is_out_of_memory(error):
                    raise
            if made is None:  # only here: the error's traceback held the batch's tensors
                self._shrink()
                continue
            self._timed(made, 1.0)
            if self._grows and made == self.now:
                self._grow(before)
            return made

    @property
    def expected(self) -> float:
        """Seconds that the next batch will take, as the last one did."""
        return self._each * min(self.now, self._in_time)

    def require_in_time(self, items: int, share: float) -> None:
        """Called on the way: TooSlowError where the batch will take far too long and not much of it is done.

        Args:
            items: in the batch.
            share: of the batch that is done, above 0 and at most 1.
        """
        takes = (time.monotonic() - self._began) / share
        if items > 1 and share <= _EARLY and takes > _FAR * self._seconds:
            self._timed(items, share)
            raise TooSlowError(f"{items} at a time would take {takes:.0f} s")

    def _timed(self, items: int, share: float) -> None:
        """Learns from `items` of which a share is done."""
        self._each = (time.monotonic() - self._began) / share / max(1, items)
        fitting = self._seconds / max(self._each, 1e-9)
        self._in_time = max(1, int(min(fitting, self._limit)))

    def _shrink(self) -> None:
        release(self._device)
        self.now, self._grows = max(1, self._items // 2), False
        _LOG.info("The batch does not fit into memory; goes on with %d at a time", self.now)

    def _watched(self) -> int:
        """Bytes held before a batch."""
        if not self._grows:
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _grow(self, before: int) -> None:
        """After a batch that fitted: as many as the free memory has room for."""
        each = max(1, (torch.cuda.max_memory_allocated(self._device) - before) // self.now)
        room = _USED * (free_memory(self._device) or 0)
        best = min(self._limit, int(room // each))
        # A single item also measures what does not grow with the batch: a few more are measured once again.
        self.now, self._grows = (max(1, min(best, _TRIAL)), best > 1) if self.now == 1 else (max(1, best), False)
