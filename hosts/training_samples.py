"""Samples of a model in training, by the host's own sampler: fixed prompts, seeds and step counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .depth_estimation import DepthPlan, estimate_along
from .port import Host

if TYPE_CHECKING:
    from torch import Tensor

    from ..samplers.parameterization import FlowParameterization
    from ..training.port import TextBackbone


@dataclass(frozen=True)
class SamplePlan:
    """What is drawn.

    Args:
        prompts: one image each.
        negative: prompt for all of them.
        steps: numbers of steps, one row of images each.
        cfg: guidance.
        width, height: pixels, multiples of 8.
        seed: of the first image; the next has the next.
        solver: of `samplers`.

    Raises:
        ValueError: no prompt, no number of steps, or a size that is no multiple of 8.
    """

    prompts: tuple[str, ...]
    negative: str
    steps: tuple[int, ...]
    cfg: float
    width: int
    height: int
    seed: int
    solver: str = "euler"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts is empty: write at least one prompt, one a line")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be numbers of at least 1, such as '4, 25', not {list(self.steps)}")
        for name in ("width", "height"):
            if getattr(self, name) < 8 or getattr(self, name) % 8:
                raise ValueError(f"{name} must be a multiple of 8, not {getattr(self, name)}")


class TrainingDepth:
    """Estimates the depth of the same images again and again.

    Args:
        host: samples and decodes.
        plan: steps, seed and solver count.
        vae, clip: the host's.
        images: IMAGE (B, H, W, 3).
    """

    of_depth = True

    def __init__(self, host: Host, plan: SamplePlan, vae: Any, clip: Any, images: Tensor) -> None:
        self._host, self._plan, self._vae, self._clip, self._images = host, plan, vae, clip, images

    def __call__(self, model: Any, flow: FlowParameterization, text: TextBackbone | None) -> list[tuple[str, Tensor]]:
        """A pair for each number of steps: "4 steps", the depth pictures (B, H, W, 3), near white.

        Args:
            model: MODEL that samples through the network in training.
            flow: along which.
            text: without effect, depth is estimated without text.
        """
        from ..depth.colors import shown_depth

        plan, longer = self._plan, max(self._images.shape[1:3])
        found = []
        for steps in plan.steps:
            how = DepthPlan(steps, plan.solver, plan.seed, resolution=longer)
            depth = estimate_along(self._host, model, flow, self._clip, self._vae, self._images, how).depth
            found.append((f"{steps} steps", shown_depth(depth, "near_white", "grey")))
        return found


class TrainingSamples:
    """Draws a plan again and again.

    Args:
        host: samples and decodes.
        plan: what.
        vae, clip: the host's; prompts are encoded now, once.
    """

    of_depth = False

    def __init__(self, host: Host, plan: SamplePlan, vae: Any, clip: Any) -> None:
        self._host, self._plan, self._vae = host, plan, vae
        self._positive = [host.encode_text(clip, prompt) for prompt in plan.prompts]
        self._negative = host.encode_text(clip, plan.negative)

    def __call__(self, model: Any, flow: FlowParameterization, text: TextBackbone | None) -> list[tuple[str, Tensor]]:
        """A pair for each number of steps: "25 steps", IMAGE (prompts, H, W, 3).

        Args:
            model: MODEL that samples through the network in training.
            flow: along which.
            text: the text encoders where they are trained, too: prompts are then encoded anew.
        """
        positive = [_encoded(text, p) for p in self._plan.prompts] if text else self._positive
        negative = _encoded(text, self._plan.negative) if text else self._negative
        return [(f"{n} steps", self._row(model, flow, n, positive, negative)) for n in self._plan.steps]

    def _row(
        self, model: Any, flow: FlowParameterization, steps: int, positive: Sequence[Any], negative: Any
    ) -> Tensor:
        import torch

        plan, host = self._plan, self._host
        solver = host.solver(plan.solver, 1e-4, 1e-4)
        clone, sigmas = host.along(model, flow, flow.times(steps))
        empty = {"samples": torch.zeros(1, 4, plan.height // 8, plan.width // 8)}
        latents = [
            host.sample(clone, prompt, negative, empty, plan.seed + i, solver, sigmas, plan.cfg)["samples"]
            for i, prompt in enumerate(positive)
        ]
        return torch.cat([host.decode_image(self._vae, latent) for latent in latents])


def _encoded(text: TextBackbone, prompt: str) -> list[list[Any]]:
    """CONDITIONING of a prompt by the encoders in training."""
    context, pooled = text.encode([prompt])
    return [[context, {} if pooled is None else {"pooled_output": pooled}]]
