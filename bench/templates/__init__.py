"""The templates of example_workflows: ComfyUI's page format and thumbnails, written from the API graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"


def api_graph(name: str) -> dict[str, Any]:
    """A template in API format, the source of everything else."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
