"""Text binding: whether samples show the shapes, colours and places that captions ask for, on the prior of shapes.

Minutes of one core, by 4 ms a sample and evaluation: 3 seeds × (64 captions × (25 × 5 + 21) evaluations, a LoRA of
75 s, 48 samples with negatives), 480 pairs of 50 evaluations, a reader of 30 s: 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ... import shape_binding
from ...runs import Runs
from ...shape_binding import BASE, GROUPS, REFLOW, TOGETHER
from ...summary import summary
from ..section import Claim, Line, Plot, Section, Table, Text, shown
from ..stage import Context, Result, Stage, of_seeds
from .priors import shapes_prior

_METHODS = (BASE, REFLOW)
_FLOOR = 0.05
_KEPT, _COMPOSED, _DROPS = 0.9, 0.8, 0.5
_ATTRIBUTES = ("shape", "colour", "place", "all")
_NAMES = {"trained": "trained captions", "new": "captions never trained"}
_PARTS = {BASE: "base", REFLOW: "after reflow"}


def setting(context: Context) -> shape_binding.Setting:
    """Of the stage."""
    normal = shape_binding.Setting(prior=shapes_prior(context))
    if not context.quick:
        return normal
    return replace(normal, captions=4, cfgs=(1.0, 3.0), steps=8, taught=8, pairs=16, training=6, batch_size=8,
                   negatives=4, real=40)  # fmt: skip


def run(context: Context) -> Result:
    """What samples show: over CFG, over steps before and after reflow, and with negatives."""
    folder, chosen = context.folder("text_binding"), setting(context)
    runs = Runs(folder / "runs", chosen)
    bench = shape_binding.Bench(context.own_models(), folder / "work", chosen, context.device)
    runs.make(_METHODS, context.seeds, bench.run)
    done = {name: each for name, each in runs.done().items() if int(name.rpartition("/")[2]) in context.seeds}
    means = summary(done | _differences(done, chosen))
    return {"setting": runs.setting, "bounds": bench.bounds(), "summary": means, "numbers": _numbers(means, chosen)}


def _differences(done: Mapping[str, Any], chosen: shape_binding.Setting) -> dict[str, Any]:
    """What is compared seed by seed, because base and reflow start at the same noise: shares of all that is right."""
    found: dict[str, Any] = {}
    for name, base in done.items():
        method, _, seed = name.rpartition("/")
        if method != BASE or f"{REFLOW}/{seed}" not in done:
            continue
        few, guidance = done[f"{REFLOW}/{seed}"]["few"], base["cfg"]
        low, guided = (guidance[f"{cfg:g}"] for cfg in (chosen.cfgs[0], chosen.guided))
        compared = {
            "guidance": {part: guided[part]["all"] - low[part]["all"] for part in TOGETHER},
            "few": {steps: few[steps]["trained"]["all"] - base["few"][steps]["trained"]["all"] for steps in few},
            "teacher": {steps: few[steps]["trained"]["all"] - guided["trained"]["all"] for steps in few},
        }
        found[f"difference/{seed}"] = compared
    return found


def _numbers(means: Mapping[str, Any], chosen: shape_binding.Setting) -> dict[str, Any]:
    """Shares of all that is right, for other commits to be compared with."""
    found = {}
    for part in TOGETHER:
        key = f"cfg/{chosen.guided:g}/{part}/all"
        found[f"{part}, CFG {chosen.guided:g}"] = of_seeds(means[BASE][key], "larger", _FLOOR)
        for steps in chosen.few:
            found[f"{part}, reflow, {steps} steps"] = of_seeds(
                means[REFLOW][f"few/{steps}/{part}/all"], "larger", _FLOOR
            )
    for method in _METHODS:
        found[f"colour kept against a negative, {method}"] = of_seeds(
            means[method]["negative/named"], "smaller", _FLOOR
        )
    return found


def render(result: Result) -> Section:
    """Shares that are right over CFG and over steps, what the reader can do, negatives, and what follows."""
    means, chosen = result["summary"], result["setting"]
    parts = (
        Text(_story(result)), _over_cfg(means, chosen), _over_steps(means, chosen),
        _bounds(result["bounds"]), _cfg_table(means, chosen), _step_table(means, chosen), _negative_table(means),
    )  # fmt: skip
    return Section(_claims(means, chosen), parts)


def _claims(means: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Claim]:
    difference, guided = means["difference"], f"cfg/{chosen['guided']:g}"
    rise = difference["guidance/trained"]
    text = f"share of samples that show all that was asked for, CFG {chosen['guided']:g} less CFG {chosen['cfgs'][0]:g}"
    claims = [Claim(text, shown(rise, "{:+.3f}"), "> 0, beyond its error", _decided(rise, _is_above(rise)), main=True)]
    one, composed = means[BASE][f"{guided}/one/all"], means[BASE][f"{guided}/one, held out/all"]
    text = "all right in colours a shape was never trained in, against those it was"
    holds = composed["mean"] >= _COMPOSED * one["mean"]
    value = f"{shown(composed)} against {shown(one)}"
    claims.append(Claim(text, value, f"≥ {_COMPOSED:g} of it", _decided(one, holds), main=True))
    teacher = means[BASE][f"{guided}/trained/all"]
    for steps in chosen["few"]:
        ours, gain = means[REFLOW][f"few/{steps}/trained/all"], difference[f"few/{steps}"]
        times = f"{steps} step{'s' if steps > 1 else ''}"
        text = f"all right after reflow in {times}, less the base in {times}"
        claims.append(Claim(text, shown(gain, "{:+.3f}"), "> 0, beyond its error", _decided(gain, _is_above(gain))))
        text = f"all right after reflow in {times}, against the teacher in {chosen['steps']}"
        value, holds = f"{shown(ours)} against {shown(teacher)}", ours["mean"] >= _KEPT * teacher["mean"]
        claims.append(Claim(text, value, f"≥ {_KEPT:g} of it", _decided(ours, holds), main=True))
    for method, name in _PARTS.items():
        named, another = (means[method][f"negative/{case}"] for case in ("named", "another"))
        text = f"samples that keep their colour though a negative prompt names it, {name}"
        value = f"{shown(named)} ({shown(another)} when it names another)"
        goal = f"< {_DROPS:g} of those when it names another"
        claims.append(Claim(text, value, goal, _decided(named, named["mean"] < _DROPS * another["mean"])))
    return claims


def _decided(cell: Mapping[str, Any], holds: bool) -> bool | None:
    """One seed says nothing."""
    return holds if cell["seeds"] > 1 else None


def _is_above(cell: Mapping[str, Any]) -> bool:
    """Whether the mean is above 0 by more than twice its standard error; one seed does not tell."""
    return cell["seeds"] > 1 and cell["mean"] > 0 and cell["mean"] > 2 * cell["deviation"] / math.sqrt(cell["seeds"])


def _story(result: Result) -> str:
    """What was found, in words that follow the numbers."""
    means, chosen, again = result["summary"], result["setting"], result["bounds"]["one"]["again"]
    base, difference = means[BASE], means["difference"]
    scales = [f"{cfg:g}" for cfg in chosen["cfgs"]]
    best = max(scales, key=lambda scale: base[f"cfg/{scale}/trained/all"]["mean"])
    right = {scale: base[f"cfg/{scale}/trained/all"]["mean"] for scale in scales}
    weakest = min(_ATTRIBUTES[:3], key=lambda name: base[f"cfg/{best}/trained/{name}"]["mean"])
    verdict = "raises" if _is_above(difference["guidance/trained"]) else "does not clearly raise"
    composed, one = (base[f"cfg/{best}/{group}/all"]["mean"] for group in ("one, held out", "one"))
    new, two = (base[f"cfg/{best}/{group}/all"]["mean"] for group in ("two, new", "two"))
    kept = [str(steps) for steps in chosen["few"] if _keeps(means, chosen, steps)]
    few = f"keeps {_KEPT:.0%} of the teacher's share in {' and '.join(kept)} steps"
    if not means[BASE][f"cfg/{chosen['guided']:g}/trained/all"]["mean"]:
        few = "has nothing to keep: the teacher shows all that was asked for in no sample"
    elif not kept:
        few = (
            f"keeps {_KEPT:.0%} of the teacher's share at none of these step counts: from {chosen['pairs']} pairs of"
            f" {chosen['taught']} captions, {chosen['pairs'] / chosen['taught']:g} noises of each, in"
            f" {chosen['training']} steps it has, as we understand it, to learn what guidance adds to each caption, and"
            " does not learn it wholly"
        )
    return (
        "Flat shapes, one or two in a picture; a small network reads shape, colour and place of each. The text encoder"
        " has random weights, so captions differ by little, and the prior is small: what it shows is a floor for real"
        f" models, and the differences are what counts. Of real shapes that went through the autoencoder alone the"
        f" reader names {again['shape']:.0%} rightly, and the colour of {again['colour']:.0%}: no sample can do"
        f" much better. CFG {verdict} the share of samples that show all that was asked"
        f" for ({right[scales[0]]:.0%} at CFG {scales[0]}, {right[best]:.0%} at its best, CFG {best}); the weakest part"
        f" is the {weakest}. Shapes in colours they were never trained in: {composed:.0%} against {one:.0%}; two things"
        f" in captions never trained: {new:.0%} against {two:.0%}. Reflow, trained on pairs of trained captions alone,"
        f" {few}."
    )


def _keeps(means: Mapping[str, Any], chosen: Mapping[str, Any], steps: int) -> bool:
    teacher = means[BASE][f"cfg/{chosen['guided']:g}/trained/all"]["mean"]
    return means[REFLOW][f"few/{steps}/trained/all"]["mean"] >= _KEPT * teacher


def _line(cells: Mapping[str, Any], key: str, at: list[Any], label: str, dashed: bool = False) -> Line:
    found = [cells[key.format(f"{x:g}")] for x in at]
    return Line(label, at, [cell["mean"] for cell in found], [cell["deviation"] for cell in found], dashed)


def _over_cfg(means: Mapping[str, Any], chosen: Mapping[str, Any]) -> Plot:
    scales = chosen["cfgs"]
    lines = [_line(means[BASE], f"cfg/{{}}/trained/{name}", scales, name) for name in _ATTRIBUTES]
    lines.append(_line(means[BASE], "cfg/{}/new/all", scales, f"all, {_NAMES['new']}", dashed=True))
    return Plot("text_binding_cfg", f"Right in {chosen['steps']} steps", "CFG", "share of samples", lines)


def _over_steps(means: Mapping[str, Any], chosen: Mapping[str, Any]) -> Plot:
    lines = [
        _line(
            means[method], f"few/{{}}/{part}/all", chosen["few"], f"{_PARTS[method]}, {name}", dashed=part != "trained"
        )
        for method in _METHODS
        for part, name in _NAMES.items()
    ]
    return Plot("text_binding_steps", "All right at few steps", "steps", "share of samples", lines, log_x=True)


def _bounds(bounds: Mapping[str, Any]) -> Table:
    rows = [
        (name, case, *(f"{bounds[name][key][attribute]:.3f}" for attribute in _ATTRIBUTES))
        for name in bounds
        for key, case in (("drawn", "as drawn"), ("again", "through the autoencoder"))
    ]
    return Table(
        "What the reader makes of real pictures: no sample can do better", ("things", "pictures", *_ATTRIBUTES), rows
    )


def _cfg_table(means: Mapping[str, Any], chosen: Mapping[str, Any]) -> Table:
    rows = [
        (f"{cfg:g}", group, *_cells(means[BASE], f"cfg/{cfg:g}/{group}")) for cfg in chosen["cfgs"] for group in GROUPS
    ]
    title = f"Shares that are right, the base in {chosen['steps']} steps"
    return Table(title, ("CFG", "captions", *_ATTRIBUTES, "colours swapped"), rows)


def _step_table(means: Mapping[str, Any], chosen: Mapping[str, Any]) -> Table:
    rows = [
        (str(steps), _PARTS[method], group, *_cells(means[method], f"few/{steps}/{group}"))
        for steps in chosen["few"]
        for method in _METHODS
        for group in GROUPS
    ]
    title = f"Shares that are right at few steps, the base at CFG {chosen['guided']:g}, after reflow at CFG 1"
    return Table(title, ("steps", "model", "captions", *_ATTRIBUTES, "colours swapped"), rows)


def _cells(cells: Mapping[str, Any], key: str) -> list[str]:
    names = (*_ATTRIBUTES, "swapped")
    return [shown(cells[f"{key}/{name}"]) if f"{key}/{name}" in cells else "-" for name in names]


def _negative_table(means: Mapping[str, Any]) -> Table:
    rows = [(name, *(shown(means[method][f"negative/{case}"]) for case in ("named", "another")))
            for method, name in _PARTS.items()]  # fmt: skip
    head = ("model", "the negative names its colour", "the negative names another")
    return Table("Samples that keep the colour they have without a negative", head, rows)


def _settings(context: Context) -> Mapping[str, Any]:
    return asdict(setting(context))


STAGE = Stage(
    "text_binding", "What captions ask for: shapes, colours, places", 3, (12.0, 1.0), run, render,
    settings=_settings, needs=("prior_shapes",), seeded=True,
)  # fmt: skip
