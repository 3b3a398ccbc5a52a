"""Fractional timesteps: whether a network that was trained on integers knows what lies between them."""

from __future__ import annotations

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
PARTS = {"near data": (0, 100), "middle": (100, 700), "near noise": (700, 1000)}
"""Of the timesteps: near data they lie farthest apart in flow time."""
_GOAL = 0.01
_BATCH = 32


def scale(context: Context) -> dict[str, int]:
    """Integer timesteps, evenly over all, and held-out digits at each."""
    return {"timesteps": 10, "items": 8} if context.quick else {"timesteps": 50, "items": 16}


def run(context: Context) -> Result:
    """The flow matching error at integer timesteps and between them, for each seed of the noise."""
    checkpoint = tiny_prior.ensure_narrow(digits_prior(context), context.models)
    prior = LoadedPrior(checkpoint, context.folder("fractional"), context.device)
    runs = {f"error/{seed}": errors_between(prior, seed, **scale(context)) for seed in context.seeds}
    means = summary(runs)["error"]
    numbers = {f"excess at +{f:g}": of_seeds(means[f"all/excess/{f:g}"], "smaller", floor=_GOAL) for f in _BETWEEN}
    return {"summary": means, "numbers": numbers}


def errors_between(prior: LoadedPrior, seed: int, timesteps: int, items: int) -> dict[str, Any]:
    """|x_data - x_noise - velocity|² at integer timesteps plus each of FRACTIONS, means over held-out digits.

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
        x_data = backbone.scale_latent(data).repeat(timesteps, 1, 1, 1).to(backbone.device)
        x_noise = torch.randn(x_data.shape, generator=torch.Generator().manual_seed(seed)).to(x_data)
        sizes = torch.zeros(len(x_data), 6, dtype=torch.long)
        given = backbone.conditioning(contexts.repeat(timesteps, 1, 1), None, sizes)
        last = objective.schedule.steps - 2
        below = torch.linspace(0, last, timesteps, dtype=torch.float64).round().repeat_interleave(items)
        errors = {f: _errors(objective, backbone, x_data, x_noise, below + f, given) for f in FRACTIONS}
        floored = {f: _errors(objective, backbone, x_data, x_noise, below + f, given, below) for f in _BETWEEN}
    parts = {"all": torch.ones_like(below, dtype=torch.bool)}
    parts |= {name: (below >= low) & (below < high) for name, (low, high) in PARTS.items()}
    return {name: _compared(errors, floored, part) for name, part in parts.items()}


def _compared(errors: dict[float, Tensor], floored: dict[float, Tensor], part: Tensor) -> dict[str, Any]:
    """Mean errors of some timesteps, and what lies above the line between those at the integers."""
    means, below = ({f: float(each[part].mean()) for f, each in some.items()} for some in (errors, floored))
    lines = {f: (1 - f) * means[0.0] + f * means[1.0] for f in _BETWEEN}
    return {
        "error": {f"{f:g}": mean for f, mean in means.items()},
        "excess": {f"{f:g}": means[f] / line - 1 for f, line in lines.items()},
        "floored_excess": {f"{f:g}": below[f] / line - 1 for f, line in lines.items()},
    }


def _held_out(prior: LoadedPrior, items: int) -> tuple[Tensor, Tensor]:
    """Latents (items, 4, 8, 8) in the autoencoder's scale, and their captions' contexts (items, 77, 768)."""
    images, labels = digits.split(held_out=True)
    chosen = torch.linspace(0, len(labels) - 1, items).long()
    pictures = digits.render(images[chosen], digits.STYLES["plain"])
    texts = [prior.host.encode_text(prior.clip, digits.caption(int(label)))[0][0] for label in labels[chosen]]
    return prior.host.encode_image(prior.vae, pictures), torch.cat(texts)


def _errors(
    objective: Objective,
    backbone: Any,
    x_data: Tensor,
    x_noise: Tensor,
    tau: Tensor,
    given: dict[str, Tensor],
    asked: Tensor | None = None,
) -> Tensor:
    """Error (B,) at timesteps tau (B,), the network asked at `asked` (B,), or at tau."""
    alignment, found = objective.alignment, []
    for part in torch.arange(len(x_data)).split(_BATCH):
        t = alignment.flow_time(tau[part].to(x_data.device))
        x_flow = interpolate(x_data[part], x_noise[part], t.float())
        step = alignment.timestep(t) if asked is None else asked[part].to(x_data.device)
        conditioning = {name: value[part] for name, value in given.items()}
        output = backbone(alignment.to_diffusion(x_flow, t), step, conditioning).float()
        error = x_data[part] - x_noise[part] - alignment.velocity(output, x_flow, t)
        found.append(error.square().flatten(1).mean(dim=1))
    return torch.cat(found).double().cpu()


def render(result: Result) -> Section:
    """The errors by fraction, and what lies above the line between the integers."""
    means = result["summary"]
    worst = max((means[f"all/excess/{f:g}"] for f in _BETWEEN), key=_mean_of)
    text = "flow matching error between integer timesteps, above the line between theirs"
    claim = Claim(text, _percent(worst), f"≤ {_GOAL:.0%}", worst["mean"] <= _GOAL, main=True)
    rows = [_row(means, part, f) for part in ("all", *PARTS) for f in FRACTIONS]
    head = ("timesteps", "behind the integer", "flow matching error", "above the line", "asked at the integer below")
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


def _row(means: dict[str, Any], part: str, f: float) -> tuple[str, ...]:
    cells = [means.get(f"{part}/{kind}/{f:g}") for kind in ("excess", "floored_excess")]
    error = shown(means[f"{part}/error/{f:g}"], "{:.5f}")
    return (part, f"+{f:g}", error, *(_percent(cell) if cell else "-" for cell in cells))


def _percent(cell: dict[str, Any]) -> str:
    spread = f" ± {cell['deviation']:.3%}" if cell["seeds"] > 1 else ""
    return f"{cell['mean']:+.3%}{spread}"


def _mean_of(cell: dict[str, Any]) -> float:
    return cell["mean"]


def _plot(means: dict[str, Any]) -> Plot:
    lines = []
    for kind, label, dashed in (("excess", "at the fraction", False), ("floored_excess", "at the integer below", True)):
        cells = [means[f"all/{kind}/{f:g}"] for f in _BETWEEN]
        values, spreads = ([100 * cell[key] for cell in cells] for key in ("mean", "deviation"))
        lines.append(Line(f"asked {label}", _BETWEEN, values, spreads, dashed))
    lines.insert(0, Line("the line between the integers", FRACTIONS, [0.0] * len(FRACTIONS)))
    return Plot(
        "fractional", "Between integer timesteps", "behind the integer timestep", "above the line between, %", lines,
        free_y=True,
    )  # fmt: skip


STAGE = Stage(
    "fractional",
    "Fractional timesteps, on the grid and between",
    4,
    (2.5, 0.2),
    run,
    render,
    settings=scale,
    needs=("prior_digits",),
    seeded=True,
)
