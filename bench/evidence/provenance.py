"""By which command, of which commit, on which machine and when something was measured. No path of the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .stage import Context, Stage

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"
_WRITTEN = (":!bench/REPORT*.md", ":!bench/results", ":!bench/report_plots*")
"""What the evidence itself rewrites does not make a commit a modified one."""


def provenance(context: Context, stage: Stage) -> dict[str, Any]:
    """What a table of the report names.

    Args:
        context: of the measurement.
        stage: that is measured.
    """
    return {
        "command": command(context, stage.name),
        "commit": commit(),
        "machine": machine(context.device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "seeds": list(context.seeds) if stage.seeded else [],
        "kind": context.kind,
        "workers": context.workers,
    }


def command(context: Context, stage: str = "") -> str:
    """The command line that measures a stage, or all; without folders of the machine."""
    words = ["python -m diff2flow_nodes bench"]
    words += ["--quick"] if context.quick else []
    words += ["--full"] if context.full else []
    words += [f"--device {context.device}"] if context.device != "cpu" else []
    words += [f"--only {stage}"] if stage else []
    return " ".join(words)


def commit(root: Path = ROOT) -> str:
    """The commit's first 12 digits, "modified" behind them where the files differ; "unknown" without git.

    Args:
        root: of the checkout.
    """
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    if not revision or _git(root, "rev-parse", "--show-prefix"):
        return UNKNOWN
    return f"{revision} modified" if _git(root, "status", "--porcelain", "--", ".", *_WRITTEN) else revision


def code_digest(root: Path = ROOT) -> str:
    """Digest of the pack's Python files, tests aside: what a result depends on, with and without git."""
    sha = hashlib.sha256()
    rooms = sorted(path.parent for path in root.glob("*/__init__.py") if path.parent.name != "tests")
    for path in sorted([*root.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]):
        sha.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, torch, its threads, and the GPU where one is used.

    Args:
        device: "cpu" or "cuda".
    """
    import torch

    found = {"cpu": _processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    found |= {"threads": torch.get_num_threads(), "system": platform.system()}
    if device != "cpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def machine_shown(found: dict[str, Any]) -> str:
    """A machine in words."""
    gpu = f"{found['gpu']}, " if "gpu" in found else ""
    return f"{gpu}{found['cpu']}, {found['cores']} cores, torch {found['torch']}, {found['threads']} thread(s)"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine() or UNKNOWN


def _git(root: Path, *words: str) -> str:
    """What git says, "" where it says nothing or there is none."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
