"""The pack's web folder, read as files: ComfyUI loads every .js in it, and nothing may come from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parent.parent / "web"
SCRIPTS = sorted(WEB.rglob("*.js"))
IMPORT = re.compile(r'^import\s[^"\']*["\']([^"\']+)["\']', re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(WEB).as_posix())
def test_only_the_entry_knows_comfyui(script: Path) -> None:
    """The rest is loaded as an extension too, which does nothing, and is tested without ComfyUI."""
    text = script.read_text(encoding="utf-8")
    for imported in IMPORT.findall(text):
        outside = imported.startswith("../../scripts/")
        assert outside == (script.name == "diff2flow.js" and "/scripts/" in imported), f"{script} imports {imported}"
        assert outside or (script.parent / imported).resolve().is_file(), f"{script}: no file {imported}"
    assert not re.search(r"https?://", text) and "eval(" not in text
    assert script.name == "diff2flow.js" or "registerExtension" not in text


def test_the_library_is_whole_and_has_its_licence() -> None:
    """A name with its version: browsers may keep .mjs files, which ComfyUI serves without a word about caching."""
    [library] = WEB.rglob("*.mjs")
    assert (
        re.fullmatch(r"uPlot-\d+\.\d+\.\d+\.mjs", library.name) and "export { uPlot as default }" in library.read_text()
    )
    assert "Permission is hereby granted" in (library.parent / "uPlot-LICENSE.txt").read_text()
    assert (library.with_suffix(".min.css")).is_file()


def test_the_train_node_begins_with_ten_widgets_at_most() -> None:
    """Every name that its recipes show is an input, or the control that ComfyUI puts behind a seed."""
    from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS

    [listed] = re.findall(r"USUAL = \[(.*?)\]", (WEB / "panel" / "recipe.js").read_text(encoding="utf-8"))
    usual, declared = set(re.findall(r'"(\w+)"', listed)), NODE_CLASS_MAPPINGS["Diff2FlowTrain"].INPUT_TYPES()
    inputs = {name: kind for part in ("required", "optional") for name, (kind, _) in declared[part].items()}
    widgets = {
        name for name, kind in inputs.items() if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN")
    }
    assert usual - widgets == {"control_after_generate"} and len(usual) <= 10 < len(widgets)
