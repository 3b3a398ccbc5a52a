"""A training loop for small networks: averaged weights, saved state, continues after a kill as if nothing had been."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import written_whole

log = logging.getLogger(__name__)
_BETAS = (0.9, 0.99)
_LAST_RATE = 0.02
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Args:
        steps: of the optimizer, AdamW.
        rate: highest learning rate; it rises linearly over `warm_up` steps and falls to 2 % as a cosine.
        warm_up: steps.
        average: decay of the averaged weights, reached gradually.
        clip: greatest norm of the gradient.
        seed: of the random numbers each step draws.
        save_every: seconds between saved states.
    """

    steps: int
    rate: float
    warm_up: int = 30
    average: float = 0.995
    clip: float = 1.0
    seed: int = 0
    save_every: float = 60.0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, 0 being the first."""
        rise = min(1.0, (step + 1) / max(self.warm_up, 1))
        fall = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.rate * rise * (_LAST_RATE + (1.0 - _LAST_RATE) * fall)


class ShortTraining:
    """Trains a network and keeps its averaged weights.

    Args:
        module: the network; its parameters are trained in place.
        plan: how long and how fast.
        state: file that the state is saved in; deleted by nobody.
        key: what the state belongs to; a state of another key is not continued.
        title: of the progress bar.
    """

    def __init__(self, module: nn.Module, plan: Plan, state: Path, key: str, title: str) -> None:
        self.module, self.plan, self._state, self._key, self._title = module, plan, Path(state), key, title
        self._names, parameters = zip(*module.requires_grad_(True).named_parameters(), strict=True)
        self._parameters: list[Tensor] = list(parameters)
        self._averages = [parameter.detach().clone() for parameter in parameters]
        self._optimizer = torch.optim.AdamW(parameters, betas=_BETAS, fused=True)
        self.step = 0
        self._restore()

    def run(self, loss: Callable[[torch.Generator], Tensor], until: int | None = None) -> None:
        """Trains up to the plan's end, or up to a step, and saves.

        Args:
            loss: draws a batch with the generator it is given (a new one each step) and returns its loss.

        Raises:
            ValueError: the loss is not finite; the last saved state stays.
        """
        from tqdm import tqdm

        last, saved = self.plan.steps if until is None else min(until, self.plan.steps), time.monotonic()
        if self.step >= last:
            return
        self.module.train()
        with tqdm(total=self.plan.steps, initial=self.step, desc=self._title, mininterval=1.0) as bar:
            while self.step < last:
                value = self._one(loss)
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                bar.update()
                if time.monotonic() - saved > self.plan.save_every:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def averaged(self) -> nn.Module:
        """The network with the averaged weights, frozen. Training does not go on from it."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._averages, strict=True):
                parameter.copy_(average)
        return self.module.requires_grad_(False).eval()

    def _one(self, loss: Callable[[torch.Generator], Tensor]) -> float:
        value = loss(torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step))
        if not torch.isfinite(value):
            raise ValueError(f"{self._title}: the loss of step {self.step} is {float(value.detach())}")
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        self._optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self._parameters, self.plan.clip)
        self._optimizer.step()
        decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, [p.detach() for p in self._parameters], 1.0 - decay)
        self.step += 1
        return float(value.detach())

    def save(self) -> None:
        """Writes weights, averages and the optimizer's moments."""
        from safetensors.torch import save_file

        tensors = dict(self._tensors())
        with written_whole(self._state) as temporary:
            save_file(tensors, str(temporary), metadata={"key": self._key, "step": str(self.step)})

    def _tensors(self) -> Mapping[str, Tensor]:
        found = {}
        for name, parameter, average in zip(self._names, self._parameters, self._averages, strict=True):
            moments = self._optimizer.state.get(parameter, {})
            parts = {"weight": parameter.detach(), "average": average}
            parts |= {moment: moments[moment] for moment in _MOMENTS if moment in moments}
            found |= {f"{name}/{part}": value.contiguous() for part, value in parts.items()}
        return found

    def _restore(self) -> None:
        from safetensors import safe_open

        if not self._state.is_file():
            return
        with safe_open(str(self._state), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != self._key:
                return
            self.step = int(metadata["step"])
            with torch.no_grad():
                for name, parameter, average in zip(self._names, self._parameters, self._averages, strict=True):
                    parameter.copy_(file.get_tensor(f"{name}/weight"))
                    average.copy_(file.get_tensor(f"{name}/average"))
                    # the fused optimizer reads moments in the order in which the weights lie in memory
                    moments = {
                        moment: torch.empty_like(parameter).copy_(file.get_tensor(f"{name}/{moment}")).detach()
                        for moment in _MOMENTS
                    }
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        log.info("%s: continues at step %d of %d", self._title, self.step, self.plan.steps)
