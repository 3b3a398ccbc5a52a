"""The report as Markdown with plots, composed of the results alone: equal results give equal bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import written_whole
from .pictures import save_plot
from .provenance import machine_shown
from .section import Claim, Plot, Section, Table, Text
from .stage import SECTIONS, Stage

Entry = Mapping[str, Any]
_CLAIM = ("claim", "found", "goal", "")
_VERDICTS = {True: "holds", False: "**does not hold**", None: "-"}


def write_report(document: Mapping[str, Any], path: Path, stages: Sequence[Stage]) -> None:
    """Writes the report and, into <its name>_plots beside it, its plots; older plots there are removed.

    Args:
        document: what evidence.json holds.
        path: of the Markdown file.
        stages: that its entries are from, in the order of the report.
    """
    plots = path.with_name(f"{path.stem.lower()}_plots")
    shown = {stage: document["stages"][stage.name] for stage in stages if stage.name in document["stages"]}
    sections = {stage.name: stage.render(entry["result"]) for stage, entry in shown.items() if "result" in entry}
    wanted = [part for section in sections.values() for part in section.parts if isinstance(part, Plot)]
    for old in plots.glob("*.png"):
        if old.stem not in {plot.name for plot in wanted}:
            old.unlink()
    for plot in wanted:
        save_plot(plot, plots / f"{plot.name}.png")
    with written_whole(path) as temporary:
        temporary.write_text("\n\n".join(_parts(document, shown, sections, plots.name)) + "\n", encoding="utf-8")


def _parts(
    document: Mapping[str, Any], shown: Mapping[Stage, Entry], sections: Mapping[str, Section], plots: str
) -> Iterator[str]:
    yield "# Evidence"
    yield (
        f"Written by `{_command(document)}` from its results, and by nothing else ({document['kind']} run). ± is the"
        " standard deviation over the seeds, where a table names some; each names its command, commit and machine, too."
    )
    if document["kind"] == "quick":
        yield "The priors of a quick run are hardly trained: it shows that all of this runs, not what comes of it."
    yield from _overview({stage: sections[stage.name] for stage in shown if stage.name in sections})
    if failures := [line for stage, entry in shown.items() if (line := _failure(stage, entry))]:
        yield "\n".join(failures)
    for number, title in SECTIONS.items():
        mine = [stage for stage in shown if stage.section == number and stage.name in sections]
        if mine:
            yield f"## {number}. {title}"
        for stage in mine:
            yield f"### {stage.title}"
            yield from _section(sections[stage.name], shown[stage], plots)


def _overview(sections: Mapping[Stage, Section]) -> Iterator[str]:
    """The main claims, and whatever does not hold."""
    claims = [(stage, claim) for stage, section in sections.items() for claim in section.claims]
    counts = Counter(claim.holds for _, claim in claims if claim.goal)
    yield (
        f"Of {counts.total()} claims {counts[True]} hold, {counts[False]} do not, {counts[None]} were measured too"
        " little to say. The main ones:"
    )
    rows = [(_link(stage), *_claim(claim)) for stage, claim in claims if claim.main]
    yield _table(Table("", ("measured in", *_CLAIM), rows))
    if lacking := [(_link(stage), *_claim(claim)[:3]) for stage, claim in claims if claim.holds is False]:
        yield "All that does not hold:"
        yield _table(Table("", ("measured in", *_CLAIM[:3]), lacking))


def _link(stage: Stage) -> str:
    """To the stage's heading, as GitHub and GitLab name it."""
    kept = "".join(letter for letter in stage.title.lower() if letter.isalnum() or letter in " -_")
    return f"[{stage.title}](#{kept.replace(' ', '-')})"


def _section(section: Section, entry: Entry, plots: str) -> Iterator[str]:
    about = _about(entry)
    if section.claims:
        yield _table(Table("", _CLAIM, [_claim(claim) for claim in section.claims]))
    for part in section.parts:
        if isinstance(part, Text):
            yield part.text
        elif isinstance(part, Plot):
            yield f"![{part.title}]({plots}/{part.name}.png)"
        else:
            yield f"{_table(part)}\n\n{about}"
    if not any(isinstance(part, Table) for part in section.parts):
        yield about


def _claim(claim: Claim) -> tuple[str, ...]:
    return claim.text, claim.value, claim.goal or "-", _VERDICTS[claim.holds]


def _table(table: Table) -> str:
    head = f"**{table.title}**\n\n" if table.title else ""
    lines = [_row(table.head), "|---" * len(table.head) + "|", *map(_row, table.rows)]
    return head + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _about(entry: Entry) -> str:
    """How a table came about, in small print."""
    about = entry["provenance"]
    seeds = ", ".join(map(str, about["seeds"]))
    seeds = f"seeds {seeds}, ± standard deviation" if seeds else "no seeds"
    return (
        f"<sub>`{about['command']}`; commit {about['commit']}; {machine_shown(about['machine'])}; {seeds};"
        f" {entry['seconds']:.0f} s; {about['date']}</sub>"
    )


def _failure(stage: Stage, entry: Entry) -> str:
    if "error" in entry:
        return f"- **{stage.name} failed:** {entry['error']}"
    return f"- {stage.name} was left out: {entry['left_out']}" if "left_out" in entry else ""


def _command(document: Mapping[str, Any]) -> str:
    return {"quick": "make bench-quick", "normal": "make bench"}.get(
        document["kind"], "python -m diff2flow_nodes bench --device cuda --full"
    )
