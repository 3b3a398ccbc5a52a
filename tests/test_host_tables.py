"""The tables of core's patches and samplers in docs/troubleshooting.md are those of the numbers that were kept."""

from __future__ import annotations

import json

import pytest
from doc_pages import ROOT

from diff2flow_nodes.bench import host_tables

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables() -> None:
    results = host_tables.kept()
    assert set(results) == {"0.33.0", "0.3.64"}
    assert host_tables.patch_table(results) in PAGE
    assert host_tables.sampler_table(results) in PAGE
    words = " ".join(PAGE.split())
    assert ", ".join(host_tables.without_effect(results)) in words


def test_every_patch_has_the_stock_effect() -> None:
    rows = [(name, row) for found in host_tables.kept().values() for name, row in found["patches"].items()]
    assert len(rows) > 60
    assert not [(name, row) for name, row in rows if row["apart"] > 1e-2]


def test_lines_tell_effects_and_versions_apart() -> None:
    row = {"stock": 0.25, "ours": 0.25, "apart": 0.0004}
    nothing = {"stock": 0.0, "ours": 0.0, "apart": 0.0003}
    results = {
        "2": {"patches": {"B": row, "A": row, "C": nothing}, "stock_samplers": {"s": {"simple": ["works", 1.0, 1.0]}}},
        "1": {"patches": {"B": row}, "stock_samplers": {"s": {"simple": ["off", 1.4, 0.9], "normal": ["works", 1, 1]}}},
    }
    assert host_tables.patch_table(results).splitlines()[2:] == [
        "| A | 0.25 | 0.0004 |  |  |",
        "| B | 0.25 | 0.0004 | 0.25 | 0.0004 |",
    ]
    assert host_tables.without_effect(results) == ["C"]
    assert host_tables.sampler_table(results).splitlines()[2:] == [
        "| s | 1.00 / 1.00 | 1.40 / 0.90, **off** | simple |"
    ]


def test_a_check_that_failed_is_no_result() -> None:
    line = "RESULTS " + json.dumps({"patches": {"ok": False, "found": "AssertionError: x"}})
    with pytest.raises(ValueError, match="patches failed"):
        host_tables.read_output(line)
