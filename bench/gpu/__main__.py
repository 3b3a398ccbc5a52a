"""Everything that one short run on a card measures.

    python -m diff2flow_nodes.bench.gpu [--small] [--seconds 480] [--out DIR] [PHASE ...]

Each finding is a line of JSON, on stdout and in DIR/findings.jsonl. What fails is told and the next phase goes on; what
the time does not suffice for is named, and can be given as PHASE to another run.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from .findings import Findings
from .phases import PHASES
from .setting import Setting, emptied

_SHM = Path("/dev/shm")
FILE = "findings.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the phases; 1 if one of them failed, 2 where there is no card."""
    given = _parsed(arguments)
    logging.basicConfig(level=logging.WARNING)
    if not given.small and not torch.cuda.is_available():
        print("there is no CUDA device; --small tries the run itself on the CPU", file=sys.stderr)
        return 2
    findings = Findings(given.out / FILE, given.seconds)
    # Checkpoints of some gigabytes, which a disk would be slow with.
    place = _SHM if not given.small and _SHM.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="diff2flow_gpu_") as folder:
        tempfile.tempdir = folder
        setting = Setting(given.small, Path(folder), findings)
        for name in given.phases or PHASES:
            with emptied():
                findings.phase(name, partial(PHASES[name], setting))
        tempfile.tempdir = None
    findings.tell("end", failed=findings.failed, skipped=findings.skipped)
    return 1 if findings.failed else 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="diff2flow_nodes.bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"in this order, or all: {', '.join(PHASES)}")
    parser.add_argument("--small", action="store_true", help="on the CPU with tiny networks, to try the run itself")
    parser.add_argument("--seconds", type=float, default=480.0, help="what has not begun by then is skipped (480)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".cache/gpu")), help="of the findings")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.phases if name not in PHASES]
    if unknown:
        parser.error(f"unknown phase {unknown[0]!r}; the phases are {', '.join(PHASES)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
