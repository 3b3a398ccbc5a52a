"""The templates on ComfyUI's own page, in a real Chromium: each opens and gives the API prompt that it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser, missing
from comfy_server import ComfyServer, comfy_dir

from diff2flow_nodes.bench.templates import api_graph
from diff2flow_nodes.bench.templates.declared import completed
from diff2flow_nodes.bench.templates.words import TEMPLATES
from diff2flow_nodes.tests.tiny_templates import write_inputs

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
SHOTS = os.environ.get("TEMPLATE_SHOTS")
"""Folder for pictures of the templates; none without."""
OPEN = """async ([name, vue]) => {
  await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue);
  const page = await fetch(`/api/workflow_templates/diff2flow_nodes/${name}.json`);
  await app.loadGraphData(await page.json(), true, true, name);
}"""
THUMBNAILS = "(count) => [...document.images].filter(({ naturalWidth }) => naturalWidth === 400).length === count"
PROMPT = "async () => (await app.graphToPrompt()).output"
BOXES = """() => app.graph.nodes.map(({ title, pos, size }) => [title, pos[0], pos[1] - 30, size[0], size[1] + 30])"""
DRAWN = """() => [...document.querySelectorAll('[data-node-id]')].map((element) => {
  const { x, y, width, height } = element.getBoundingClientRect();
  return [element.dataset.nodeId, x, y, width - 1, height - 1];
})"""
"""The nodes as elements, which they are in the Vue renderer only."""
FIT = """() => {
  const boxes = app.graph.groups.map((group) => group._bounding ?? group.boundingRect);
  const width = Math.max(...boxes.map((box) => box[0] + box[2]));
  const height = Math.max(...boxes.map((box) => box[1] + box[3]));
  const scale = Math.min((innerWidth - 100) / width, (innerHeight - 130) / height);
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [80 / scale, 110 / scale];
  app.canvas.setDirty(true, true);
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    write_inputs(folder / "input")
    with ComfyServer(comfy_dir(), folder) as running:
        yield running


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[Any]:
    """ComfyUI's page in the browser."""
    with browser() as opened:
        found = Page(opened, 1800, 1200)
        found.page.goto(f"http://127.0.0.1:{server.port}/")
        found.page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.setting", timeout=120_000)
        found.page.wait_for_timeout(3000)
        yield found


def test_the_template_browser_shows_and_opens_them(page: Any) -> None:
    """With their thumbnails; ComfyUI shows its template browser by itself to whoever is there for the first time."""
    there = page.page.get_by_text("diff2flow_nodes", exact=True)
    if not there.count():
        page.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    there.first.click()
    page.page.wait_for_function(THUMBNAILS, arg=len(TEMPLATES), timeout=30_000)
    shot(page, "browser")
    page.page.get_by_text("few_steps", exact=True).last.click()
    loader = "() => app.graph.nodes.some((node) => node.comfyClass === 'Diff2FlowLoraLoader')"
    page.page.wait_for_function(loader, timeout=10_000)


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_it_opens_and_gives_its_prompt(page: Any, server: ComfyServer, name: str, renderer: str) -> None:
    page.complaints.clear()
    page.page.evaluate(OPEN, [name, renderer == "vue"])
    page.page.wait_for_timeout(1500)
    page.page.evaluate(FIT)
    page.page.wait_for_timeout(1000)
    shot(page, f"{name}_{renderer}")
    assert without_titles(page.page.evaluate(PROMPT)) == without_titles(completed(api_graph(name)))
    assert not [text for text in page.complaints if "diff2flow" in text.lower()]
    assert not overlapping(page.page.evaluate(BOXES))
    drawn = overlapping(page.page.evaluate(DRAWN))
    if drawn and not server.has_vue_nodes():
        pytest.xfail(f"the experimental Vue nodes of this ComfyUI have sizes of their own: {drawn} overlap")
    assert not drawn


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {node: {key: entry[key] for key in ("class_type", "inputs")} for node, entry in prompt.items()}


def overlapping(boxes: list[list[Any]]) -> list[tuple[str, str]]:
    """Titles of nodes that lie on each other as the page draws them."""
    return [
        (one[0], other[0])
        for i, one in enumerate(boxes)
        for other in boxes[:i]
        if all(one[k] < other[k] + other[k + 2] and other[k] < one[k] + one[k + 2] for k in (1, 2))
    ]
