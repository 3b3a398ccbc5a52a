"""What ComfyUI's own patches and samplers do beside ours: tables of what `tests/inside_comfy_patches.py` measured.

    python -m diff2flow_nodes.bench.host_tables 0.33.0=OUTPUT 0.3.64=OUTPUT

Each OUTPUT holds what that script printed under that version of ComfyUI. Its numbers go to bench/results/, and the
tables are printed for docs/troubleshooting.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "core_patches_and_samplers.json"
EFFECT = 1e-4
"""A relative difference above it is an effect."""


def read_output(text: str) -> dict[str, Any]:
    """Check name to what it found, of a script that printed RESULTS lines.

    Raises:
        ValueError: a check failed.
    """
    lines = [line.removeprefix("RESULTS ") for line in text.splitlines() if line.startswith("RESULTS ")]
    found: dict[str, Any] = {}
    for name, check in (item for line in lines for item in json.loads(line).items()):
        if not check["ok"]:
            raise ValueError(f"the check {name} failed: {check['found']}")
        found[name] = check["found"]
    return found


def kept() -> dict[str, dict[str, Any]]:
    """Version to check to numbers, as measured last."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def patch_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each node with an effect: effect in the stock sampler, and how far ours is from it, by version."""
    versions = list(results)
    names = dict.fromkeys(name for version in versions for name in results[version]["patches"])
    lines = [_row(["Node", *(f"{what}, {v}" for v in versions for what in ("effect", "apart"))])]
    lines.append(_row(["---", *["---:"] * 2 * len(versions)]))
    for name in sorted(names, key=str.lower):
        rows = [results[version]["patches"].get(name) for version in versions]
        if any(row and row["stock"] > EFFECT for row in rows):
            lines.append(_row([name, *(cell for row in rows for cell in _patch_cells(row))]))
    return "\n".join(lines)


def _patch_cells(row: Mapping[str, float] | None) -> list[str]:
    return [f"{row['stock']:.2g}", f"{row['apart']:.1g}"] if row else ["", ""]


def without_effect(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Nodes that were tried and change nothing on SD1.5 in either sampler."""
    rows = [item for found in results.values() for item in found["patches"].items()]
    acting = {name for name, row in rows if row["stock"] > EFFECT}
    return sorted({name for name, _ in rows} - acting, key=str.lower)


def sampler_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each sampler: with `simple`, spread on the flow and the stock model by version; what fails besides."""
    versions = list(results)
    lines = [_row(["Sampler", *(f"flow / stock, {v}" for v in versions), "not with"])]
    lines.append(_row(["---", *["---:"] * len(versions), "---"]))
    for name in dict.fromkeys(name for version in versions for name in results[version]["stock_samplers"]):
        rows = [results[version]["stock_samplers"].get(name, {}) for version in versions]
        lines.append(_row([name, *(_sampler_cell(row.get("simple")) for row in rows), _failing(rows)]))
    return "\n".join(lines)


def _sampler_cell(found: Sequence[Any] | None) -> str:
    if found is None:
        return ""
    said, flow, plain = found
    return f"{flow:.2f} / {plain:.2f}" + ("" if said == "works" else f", **{said}**")


def _failing(rows: Sequence[Mapping[str, Sequence[Any]]]) -> str:
    """The schedulers with which a sampler does not work in some version."""
    names = dict.fromkeys(name for row in rows for name, found in row.items() if found[0] != "works")
    tried = {name for row in rows for name in row}
    return "any" if len(tried) > 1 and set(names) == tried else ", ".join(names)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str]) -> None:
    """Keeps and prints what VERSION=OUTPUT files hold."""
    results: dict[str, Any] = {}
    for word in words:
        version, _, path = word.partition("=")
        results[version] = read_output(Path(path).read_text(encoding="utf-8"))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(patch_table(results), ", ".join(without_effect(results)), sampler_table(results), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
