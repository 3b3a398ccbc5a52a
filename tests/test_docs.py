"""The pages: links lead somewhere, quoted messages are said, numbers are the code's and the measurements' own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import doc_pages
import pytest
import tomllib
from doc_pages import PAGES, ROOT

from diff2flow_nodes.bench import memory_table
from diff2flow_nodes.bench.full_unets import UNETS
from diff2flow_nodes.training.layers import PRESETS, choose_layers

TROUBLE = ROOT / "docs" / "troubleshooting.md"
QUOTES = doc_pages.quotes_of(TROUBLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert doc_pages.broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_pages, "ROOT", tmp_path)
    other = tmp_path / "other.md"
    other.write_text("# My Page, the 2nd\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    links = ("other.md", "other.md#my-page-the-2nd", "gone.md", "other.md#no-heading", "#here", "../out.md")
    page.write_text(
        "# Here\n" + "\n".join(f"[text]({link})" for link in links) + "\n[site](https://example.org/x.md)\n"
    )
    assert doc_pages.broken_links(page) == ["gone.md", "other.md#no-heading", "../out.md"]


def test_every_page_is_reached_from_the_readme() -> None:
    linked = doc_pages.links_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(linked)


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quoted_message_is_said(quote: str) -> None:
    assert len(quote.replace(doc_pages.VARIES, "")) >= 12
    assert doc_pages.is_said(quote)


def test_a_message_that_nobody_says_is_found() -> None:
    assert len(QUOTES) > 60
    assert not doc_pages.is_said("this run needs a better moon")
    assert not doc_pages.is_said("fit beside the network")


def _rows(page: str, part: str, until: str = "\0") -> list[list[str]]:
    """Cells of the lines of a page's tables that hold a part, up to a heading."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(until)[0].splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if part in line]


@pytest.mark.parametrize("family", UNETS)
def test_the_memory_table_holds_what_is_trained(family: str) -> None:
    """The columns that need no tracing; `bench/memory_table.py` prints all of them."""
    backbone = memory_table.Backbone(UNETS[family])
    rows = [row for row in _rows("settings.md", f"| {family} |", until="## How long it takes") if len(row) == 10]
    assert {row[2] for row in rows} == set(PRESETS) and {row[4] for row in rows} == {"off", "on"}
    for _, _, preset, _, _, _, *numbers in rows:
        frozen, trained, activations, total = map(float, numbers)
        assert frozen == pytest.approx(2 * backbone.parameters / 2**30, abs=0.06)
        assert trained == pytest.approx(16 * _trained(backbone, preset) / 2**30, abs=0.06)
        assert total == pytest.approx(frozen + trained + activations, abs=0.11)
    for preset in PRESETS:
        shown = _rows("settings.md", f"   | {preset} |")[0][1 + list(UNETS).index(family)]
        assert shown.startswith(f"{_trained(backbone, preset) / 1e6:.1f} M, ")


def _trained(backbone: memory_table.Backbone, preset: str) -> int:
    if PRESETS[preset].full:
        return backbone.parameters
    return sum(layer.size for layer in choose_layers(backbone.module, backbone.layer_names(), PRESETS[preset]))


@pytest.mark.parametrize("version", ["0.3.64", "0.33.0"])
def test_the_ratios_to_comfyuis_own_trainer_are_measured(version: str) -> None:
    found = json.loads((ROOT / "bench" / "results" / f"training_cost_{version}.json").read_text())
    time, memory, others = (found[part]["over_bare"] for part in ("speed", "memory", "others"))
    shown = {row[0]: row[2:] for row in _rows("comparison.md", f"| {version} |")}
    speed = time["median_ratio"]
    defaults = others["median_ratio"]["train_lora_node_defaults"]
    assert shown["time of a step"] == [f"{speed['ours']:.2f}", f"{speed['train_lora_node']:.2f}", f"{defaults:.1f}"]
    peak = shown["peak memory that training adds"]
    assert peak[:2] == [f"{memory['ours']:.2f}", f"{memory['train_lora_node']:.2f}"]


def test_the_readme_installs_what_there_is() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    install = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Install\n")[1].split("\n## ")[0]
    assert f"comfy node install {about['name']}" in install and f"{about['name']}[headless] @" in install
    assert install.count(about["urls"]["Repository"]) == 2
    shown = set(re.findall(r"`(\w+)` \(|`(\w+)`,", install))
    extras = {name for pair in shown for name in pair if name}
    assert extras == set(about["optional-dependencies"]) - {"headless", "dev", "browser"}
    assert f"Python {about['requires-python'].removeprefix('>=')} or newer" in install
