"""`python -m diff2flow_nodes bench`: measures, writes the results and the report; or compares two results."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs import write_json
from . import registry
from .compare import compare, read_results
from .provenance import ROOT, code_digest
from .report import write_report
from .runner import run_all
from .stage import Context, Stage
from .store import FORMAT, Store

log = logging.getLogger(__name__)
DONE, FAILED, WRONG = 0, 1, 2
Say = Callable[[str], None]


def bench(options: argparse.Namespace, say: Say, stages: Sequence[Stage] = registry.STAGES) -> int:
    """Runs the subcommand; the exit code: 1 where a stage failed or another commit is better, 2 for wrong input.

    Args:
        options: see `cli`.
        say: takes each line for stdout.
        stages: to choose from.
    """
    try:
        if options.compare:
            lines, worse = compare(*options.compare)
            for line in lines:
                say(line)
            return FAILED if worse else DONE
        if options.report:
            results, report = options.report
            write_report(read_results(results), report, stages)
            say(str(report))
            return DONE
        return _measured(options, say, stages)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return WRONG


def _measured(options: argparse.Namespace, say: Say, stages: Sequence[Stage]) -> int:
    context, chosen = _context(options), registry.chosen(options.only, stages)
    store = Store(options.out / context.kind / "results", "" if options.keep else context.code)
    entries = run_all(chosen, context, store)
    whole, failed = len(chosen) == len(stages), _complaints(entries)
    if not whole:
        entries = {**{s.name: found for s in stages if (found := store.found(s, context))}, **entries}
    results, report = _places(options, context, whole)
    document = {"format": FORMAT, "kind": context.kind, "stages": {s.name: entries[s.name] for s in stages
                                                                   if s.name in entries}}  # fmt: skip
    write_json(results, document)
    write_report(document, report, stages)
    say(str(results))
    say(str(report))
    return failed


def _complaints(entries: Mapping[str, Any]) -> int:
    failed = {name: entry["error"] for name, entry in entries.items() if "error" in entry}
    for name, error in failed.items():
        sys.stderr.write(f"error: {name}: {error}\n")
    return FAILED if failed else DONE


def _places(options: argparse.Namespace, context: Context, whole: bool) -> tuple[Path, Path]:
    """Files of the results and of the report: those in the checkout only for all stages in earnest."""
    if options.quick or not whole:
        folder = options.out / context.kind
        return folder / "evidence.json", folder / "REPORT.md"
    suffix = "_full" if options.full else ""
    return ROOT / "bench" / "results" / f"evidence{suffix}.json", ROOT / "bench" / f"REPORT{suffix}.md"


def _context(options: argparse.Namespace) -> Context:
    """What the options mean; ValueError where they contradict each other."""
    if options.quick and options.full:
        raise ValueError("--quick and --full exclude each other: leave one of them out")
    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {options.workers}")
    _require_device(options.device, options.full)
    return Context(
        models=options.models.resolve(),
        work=options.out.resolve(),
        quick=options.quick,
        full=options.full,
        device=options.device,
        seeds=(0,) if options.quick else (0, 1, 2),
        workers=options.workers,
        threads=max(1, (os.cpu_count() or 1) // options.workers),
        code=code_digest(),
    )


def _require_device(device: str, full: bool) -> None:
    import torch

    if full and not device.startswith("cuda"):
        raise ValueError(f"--full measures networks of full size and needs a GPU: give --device cuda, not {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here; leave the option out to measure on the CPU")
