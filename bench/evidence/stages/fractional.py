"""Fractional timesteps: whether a network that was trained on integers knows what lies between them."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from ....training.objective import Objective, ObjectiveSettings, interpolate
from ... import digits, tiny_prior
from ...loaded_prior import LoadedPrior
from ...summary import summary
from ..section import Claim, Line, Plot, Section, Table, Text, shown
from ..stage import Context, Result, Stage, of_seeds
from .priors import digits_prior

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_BETWEEN = FRACTIONS[1:-1]
_GOAL = 0.01
_BATCH = 32


def scale(context: Context) -> dict[str, int]:
    """Integer timesteps, evenly over all, and held-out digits at each."""
    return {"timesteps": 10, "items": 8} if context.quick else {"timesteps": 50, "items": 16}


def run(context: Context) -> Result:
    """The flow matching error at integer timesteps and between them, for each seed of the noise."""
    prior = LoadedPrior(tiny_prior.ensure_narrow(digits_prior(context), context.models), context.folder("fractional"))
    runs = {f"error/{seed}": errors_between(prior, seed, **scale(context)) for seed in context.seeds}
    means = summary(runs)["error"]
    numbers = {f"excess at +{f:g}": of_seeds(means[f"excess/{f:g}"], "smaller", floor=_GOAL) for f in _BETWEEN}
    return {"summary": means, "numbers": numbers}


def errors_between(prior: LoadedPrior, seed: int, timesteps: int, items: int) -> dict[str, Any]:
    """Mean of |x_data - x_noise - velocity|² at integer timesteps plus each of FRACTIONS, on held-out digits.

    All fractions see the same data and noise. Between two integers the error changes anyway: the excess is what lies
    above the line between theirs, as a part of it. "floored" asks the network at the integer below instead, with the
    state as it is.

    Args:
        prior: of digits.
        seed: of the noise.
        timesteps: integers, evenly over all.
        items: digits at each.
    """
    data, contexts = _held_out(prior, items)
    with prior.host.training(prior.model) as backbone, torch.no_grad():
        objective = Objective(ObjectiveSettings(), prior.model.facts.schedule, prior.model.facts.prediction)
        x_data = backbone.scale_latent(data).repeat(timesteps, 1, 1, 1)
        x_noise = torch.randn(x_data.shape, generator=torch.Generator().manual_seed(seed))
        sizes = torch.zeros(len(x_data), 6, dtype=torch.long)
        given = backbone.conditioning(contexts.repeat(timesteps, 1, 1), None, sizes)
        last = objective.schedule.steps - 2
        below = torch.linspace(0, last, timesteps, dtype=torch.float64).round().repeat_interleave(items)
        errors = {f: _mean(objective, backbone, x_data, x_noise, below + f, given) for f in FRACTIONS}
        floored = {f: _mean(objective, backbone, x_data, x_noise, below + f, given, below) for f in _BETWEEN}
    lines = {f: (1 - f) * errors[0.0] + f * errors[1.0] for f in _BETWEEN}
    return {
        "error": {f"{f:g}": error for f, error in errors.items()},
        "excess": {f"{f:g}": errors[f] / line - 1 for f, line in lines.items()},
        "floored_excess": {f"{f:g}": floored[f] / line - 1 for f, line in lines.items()},
    }


def _held_out(prior: LoadedPrior, items: int) -> tuple[Tensor, Tensor]:
    """Latents (items, 4, 8, 8) in the autoencoder's scale, and their captions' contexts (items, 77, 768)."""
    images, labels = digits.split(held_out=True)
    chosen = torch.linspace(0, len(labels) - 1, items).long()
    pictures = digits.render(images[chosen], digits.STYLES["plain"])
    texts = [prior.host.encode_text(prior.clip, digits.caption(int(label)))[0][0] for label in labels[chosen]]
    return prior.host.encode_image(prior.vae, pictures), torch.cat(texts)


def _mean(
    objective: Objective,
    backbone: Any,
    x_data: Tensor,
    x_noise: Tensor,
    tau: Tensor,
    given: dict[str, Tensor],
    asked: Tensor | None = None,
) -> float:
    """Mean error at timesteps tau (B,), the network asked at `asked` (B,), or at tau."""
    alignment, found = objective.alignment, []
    for part in torch.arange(len(x_data)).split(_BATCH):
        t = alignment.flow_time(tau[part])
        x_flow = interpolate(x_data[part], x_noise[part], t.float())
        step = alignment.timestep(t) if asked is None else asked[part]
        conditioning = {name: value[part] for name, value in given.items()}
        output = backbone(alignment.to_diffusion(x_flow, t), step, conditioning).float()
        error = x_data[part] - x_noise[part] - alignment.velocity(output, x_flow, t)
        found += error.square().flatten(1).mean(dim=1).tolist()
    return statistics.fmean(found)


def render(result: Result) -> Section:
    """The errors by fraction, and what lies above the line between the integers."""
    means = result["summary"]
    worst = max((means[f"excess/{f:g}"] for f in _BETWEEN), key=lambda cell: cell["mean"])
    text = "flow matching error between integer timesteps, above the line between theirs"
    claim = Claim(text, f"{worst['mean']:+.3%} ± {worst['deviation']:.3%}", f"≤ {_GOAL:.0%}", worst["mean"] <= _GOAL)
    rows = []
    for f in FRACTIONS:
        excess, floored = (means.get(f"{kind}/{f:g}") for kind in ("excess", "floored_excess"))
        cells = [_percent(cell) if cell else "-" for cell in (excess, floored)]
        rows.append((f"+{f:g}", shown(means[f"error/{f:g}"], "{:.5f}"), *cells))
    head = ("timestep", "flow matching error", "above the line", "above the line, asked at the integer below")
    return Section(
        [claim],
        (
            Text(
                "The paper asks the network at fractional timesteps, which it has never seen. Measured on held-out"
                " digits, the same data and noise at an integer timestep and at fractions behind it; 0 above the line"
                " between the integers means that nothing is lost between them."
            ),
            Table("Error at and between integer timesteps", head, rows),
            _plot(means),
        ),
    )


def _percent(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:+.3%} ± {cell['deviation']:.3%}"


def _plot(means: dict[str, Any]) -> Plot:
    errors = [means[f"error/{f:g}"] for f in FRACTIONS]
    first, last = errors[0]["mean"], errors[-1]["mean"]
    line = [100 * (cell["mean"] / (first + f * (last - first)) - 1) for f, cell in zip(FRACTIONS, errors, strict=True)]
    floored = [means[f"floored_excess/{f:g}"] for f in _BETWEEN]
    return Plot(
        "fractional", "Between integer timesteps", "behind the integer timestep", "above the line between, %",
        [
            Line("asked at the fraction", FRACTIONS, line),
            Line("asked at the integer below", _BETWEEN, [100 * cell["mean"] for cell in floored], dashed=True),
        ],
        free_y=True,
    )  # fmt: skip


STAGE = Stage(
    "fractional",
    "Fractional timesteps, on the grid and between",
    4,
    (1.5, 0.2),
    run,
    render,
    settings=scale,
    needs=("prior_digits",),
)
