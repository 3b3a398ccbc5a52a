"""Noise schedules: how much data and how much noise each of the network's integer timesteps sees."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import mul

import torch
from torch import Tensor

from .precision import FLOAT64

# Below this t_min the last timestep holds no usable signal (alpha < 0.001): it is zero-terminal-SNR.
SIGNAL_FLOOR = 1e-3
# The cosine schedule's last beta would be 1; its authors clip it so that the terminal keeps a trace of signal.
COSINE_MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """An immutable table of noise levels, one per integer timestep tau = 0 (data) ... T-1 (noise).

    Build it by one of the class methods. Two schedules are equal when their kind and their values are.

    Attributes:
        kind: "vp" (alpha² + sigma² = 1) or "ve" (alpha = 1).
        values: the T >= 2 levels as Python floats. "vp": `alphas_cumprod` = alpha², strictly decreasing in [0, 1);
            "ve": sigma, strictly increasing and positive.
        name: what `describe` returns; not part of equality.

    Raises:
        ValueError: an unknown kind, fewer than two values, or one that is not finite, out of range or out of order.
    """

    kind: str
    values: tuple[float, ...] = field(repr=False)
    name: str = field(compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("vp", "ve"):
            raise ValueError(f"kind must be 'vp' or 've', got {self.kind!r}")
        if len(self.values) < 2:
            raise ValueError(f"a schedule needs at least 2 timesteps, got {len(self.values)}")
        self._check_range()
        self._check_order()

    @classmethod
    def scaled_linear(cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> "NoiseSchedule":
        """Return Stable Diffusion's schedule: sqrt(beta) runs linearly from sqrt(start) to sqrt(end).

        Args:
            steps: T, at least 2.
            start, end: the first and the last beta, 0 < start <= end < 1.

        Raises:
            ValueError: steps or betas out of range.
        """
        _check_betas(steps, start, end)
        roots = _ramp(math.sqrt(start), math.sqrt(end), steps)
        return cls._from_betas([root * root for root in roots], f"scaled_linear({steps}, {start}, {end})")

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "NoiseSchedule":
        """Return DDPM's schedule: beta runs linearly from start to end. Arguments as in `scaled_linear`."""
        _check_betas(steps, start, end)
        return cls._from_betas(_ramp(start, end, steps), f"linear({steps}, {start}, {end})")

    @classmethod
    def cosine(cls, steps: int = 1000) -> "NoiseSchedule":
        """Return Nichol and Dhariwal's schedule: alpha² ~ cos²(pi/2 · (tau/T + 0.008)/1.008), beta at most 0.999.

        Args:
            steps: T, at least 2.

        Raises:
            ValueError: steps out of range.
        """
        _check_steps(steps)
        level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - after / before, COSINE_MAX_BETA) for before, after in pairwise(level)]
        return cls._from_betas(betas, f"cosine({steps})")

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> "NoiseSchedule":
        """Return the VP schedule alphas_cumprod[i] = prod over j <= i of (1 - betas[j]).

        Args:
            betas: (T,), each in (0, 1]; only the last may be 1 (zero terminal SNR).

        Raises:
            ValueError: a beta out of range, or what the class raises.
        """
        return cls._from_betas(_floats(betas, "betas"))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> "NoiseSchedule":
        """Return the VP schedule with alpha² = alphas_cumprod[tau].

        Args:
            alphas_cumprod: (T,), strictly decreasing in [0, 1); only the last may be 0 (zero terminal SNR).

        Raises:
            ValueError: see the class.
        """
        values = _floats(alphas_cumprod, "alphas_cumprod")
        return cls("vp", values, f"alphas_cumprod({_digest(values)})")

    @classmethod
    def from_sigmas(cls, sigmas: Tensor | Sequence[float]) -> "NoiseSchedule":
        """Return the VE schedule x_diff = x_data + sigmas[tau]·x_noise.

        Args:
            sigmas: (T,), positive and strictly increasing.

        Raises:
            ValueError: see the class.
        """
        values = _floats(sigmas, "sigmas")
        return cls("ve", values, f"sigmas({_digest(values)})")

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """Return this VP schedule with alpha shifted and scaled so that its last is 0 and its first is kept.

        alpha' = (alpha - alpha[T-1])·alpha[0]/(alpha[0] - alpha[T-1])   (Lin et al., arXiv 2305.08891, Alg. 1)

        Raises:
            ValueError: the schedule is VE.
        """
        if self.kind != "vp":
            raise ValueError(f"zero terminal SNR is defined for 'vp' schedules only, this one is {self.kind!r}")
        if self.values[-1] == 0:
            return self
        alphas = [math.sqrt(value) for value in self.values]
        scale = alphas[0] / (alphas[0] - alphas[-1])
        values = tuple(((alpha - alphas[-1]) * scale) ** 2 for alpha in alphas)
        return NoiseSchedule("vp", values, f"zero_terminal_snr({self.name})")

    def switched(self, zero_terminal_snr: str) -> "NoiseSchedule":
        """Return the schedule with zero terminal SNR "on", "off" (a rescaled one becomes SD's plain one), or "auto": as
        it is.

        Raises:
            ValueError: another word, or "on" for a VE schedule.
        """
        if zero_terminal_snr not in ("auto", "on", "off"):
            raise ValueError(f"zero_terminal_snr must be auto, on or off, got {zero_terminal_snr!r}")
        if zero_terminal_snr == "on":
            return self.zero_terminal_snr()
        if zero_terminal_snr == "off" and self.is_zero_terminal_snr:
            return NoiseSchedule.scaled_linear()
        return self

    @property
    def steps(self) -> int:
        """T, the number of integer timesteps."""
        return len(self.values)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64: alpha² of the VP schedule; for VE that of the VP schedule with the same SNR, 1/(1+sigma²)."""
        values = torch.tensor(self.values, dtype=FLOAT64)
        return values if self.kind == "vp" else 1 / (1 + values**2)

    @property
    def flow_times(self) -> Tensor:
        """(T,) float64, decreasing: the flow time f_t(tau) = alpha/(alpha+sigma) of each integer tau (Eq. 11)."""
        return torch.tensor([self._flow_time(value) for value in self.values], dtype=FLOAT64)

    @property
    def is_zero_terminal_snr(self) -> bool:
        """Whether the last timestep holds no usable signal: its flow time is 0, or below 0.001.

        The stand-ins for 0 are meant too: ComfyUI writes alphas_cumprod[-1] = 4.9e-8, diffusers 2**-24. A schedule
        that ends on a beta clipped at 0.999, as the cosine schedule does (at 2.4e-9), is not: its authors clip the
        beta to keep a finite terminal, and networks are trained on it with every kind of prediction.
        """
        clipped = self.kind == "vp" and abs(self.values[-1] / self.values[-2] - (1 - COSINE_MAX_BETA)) < 1e-6
        return self._flow_time(self.values[-1]) < SIGNAL_FLOOR and not clipped

    def describe(self) -> str:
        """Return a short, stable description for metadata: "scaled_linear(1000, 0.00085, 0.012)".

        Schedules given by their values are named by a digest, to ten digits: "alphas_cumprod(sha256:...)".
        """
        return self.name

    @classmethod
    def _from_betas(cls, betas: Sequence[float], name: str | None = None) -> "NoiseSchedule":
        for index, beta in enumerate(betas):
            if not 0 < beta <= 1:
                raise ValueError(f"each beta must be in (0, 1], got betas[{index}] = {beta}")
        values = tuple(accumulate((1 - beta for beta in betas), mul))
        return cls("vp", values, name or f"alphas_cumprod({_digest(values)})")

    def _flow_time(self, value: float) -> float:
        if self.kind == "ve":
            return 1 / (1 + value)
        alpha, sigma = math.sqrt(value), math.sqrt(1 - value)
        return alpha / (alpha + sigma)

    def _check_range(self) -> None:
        for index, value in enumerate(self.values):
            if self.kind == "vp" and not 0 <= value < 1:
                raise ValueError(f"alphas_cumprod must be in [0, 1), got {value} at index {index}")
            if self.kind == "ve" and not 0 < value < math.inf:
                raise ValueError(f"sigmas must be positive and finite, got {value} at index {index}")

    def _check_order(self) -> None:
        times = [1.0, *map(self._flow_time, self.values)]
        for index, (before, after) in enumerate(pairwise(times)):
            if not after < before:
                raise ValueError(
                    f"noise must grow strictly with the timestep: {self.values[index]} at index {index} does not"
                    f" follow {self.values[index - 1] if index else 'no noise'}"
                )


def _ramp(start: float, end: float, steps: int) -> list[float]:
    return torch.linspace(start, end, steps, dtype=FLOAT64).tolist()


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps must be an integer of at least 2, got {steps!r}")


def _check_betas(steps: int, start: float, end: float) -> None:
    _check_steps(steps)
    if not 0 < start <= end < 1:
        raise ValueError(f"betas must satisfy 0 < start <= end < 1, got start={start}, end={end}")


def _floats(values: Tensor | Sequence[float], what: str) -> tuple[float, ...]:
    table = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=FLOAT64)
    if table.ndim != 1:
        raise ValueError(f"{what} must have one dimension, got shape {tuple(table.shape)}")
    return tuple(map(float, table.tolist()))


def _digest(values: Sequence[float]) -> str:
    text = ",".join(f"{value:.9e}" for value in values)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
