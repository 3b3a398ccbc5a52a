"""Writes every template's page: python -m diff2flow_nodes.bench.templates."""

from __future__ import annotations

from . import FOLDER, api_graph
from .page import as_json, page
from .words import TEMPLATES


def written(name: str) -> str:
    """The text of a template's page, from its API graph."""
    return as_json(page(name, api_graph(name), TEMPLATES[name]))


def main() -> None:
    """Writes the files and names them."""
    for name in TEMPLATES:
        path = FOLDER / f"{name}.json"
        path.write_text(written(name), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
