"""The training panel in the real ComfyUI, driven in a real Chromium; needs COMFYUI_DIR, Playwright and Chromium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, missing
from comfy_server import ComfyServer, comfy_dir

from diff2flow_nodes.bench import digits
from diff2flow_nodes.bench.demo import GOLDEN, IMAGES, STYLE
from diff2flow_nodes.bench.random_prior import build_random

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

PRIOR, STEPS, SECONDS = os.environ.get("PANEL_PRIOR"), int(os.environ.get("PANEL_STEPS", "40")), 600
"""A checkpoint of the tiny prior (`make prior`), whose samples are digits; random weights without. Steps of the run."""
SHOTS = os.environ.get("PANEL_SHOTS")
"""Folder for pictures of what the tests see; none without."""
TEMPLATE = "finetune_and_sample"
TRAIN = "app.graph.nodes.find((node) => node.comfyClass === 'Diff2FlowTrain')"
LOOK = f"""() => {{
  const node = {TRAIN}, view = app.canvas.ds;
  view.scale = 0.8;
  view.offset = [120 - node.pos[0], 170 - node.pos[1]];
  app.canvas.setDirty(true, true);
}}"""
SAMPLES = "() => document.querySelectorAll('.d2f-sample').length >= 2"
CURVE = """() => {
  const canvas = document.querySelector('.d2f-chart canvas');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const near = (i) => Math.abs(data[i] - 78) + Math.abs(data[i + 1] - 168) + Math.abs(data[i + 2] - 255) < 40;
  return [...Array(data.length / 4).keys()].filter((i) => data[4 * i + 3] > 200 && near(4 * i)).length;
}"""


FILL = """([title, inputs]) => {
  const node = app.graph.nodes.find((node) => node.title === title);
  for (const [name, value] of Object.entries(inputs)) {
    const widget = node.widgets.find((widget) => widget.name === name);
    widget.value = value;
    widget.callback?.(value);
  }
}"""
FIT = """() => {
  const boxes = app.graph.nodes.map(({ pos, size }) => [pos[0], pos[1] - 40, pos[0] + size[0], pos[1] + size[1]]);
  const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
  const [right, bottom] = [2, 3].map((i) => Math.max(...boxes.map((box) => box[i])));
  const view = app.canvas.ds;
  view.scale = Math.min((innerWidth - 90) / (right - left), (innerHeight - 140) / (bottom - top));
  view.offset = [70 / view.scale - left, 130 / view.scale - top];
  app.canvas.setDirty(true, true);
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    checkpoint = folder / "models" / "checkpoints" / GOLDEN["Checkpoint"]["ckpt_name"]
    if PRIOR:
        checkpoint.symlink_to(Path(PRIOR).resolve())
    else:
        build_random(checkpoint)
    digits.write(folder / "input" / GOLDEN["Images and captions"]["folder"], STYLE, IMAGES)
    with running:
        yield running


def open_template(page: Page, server: ComfyServer, vue: bool) -> None:
    """As a visitor does: the template browser, the pack, the template."""
    page.page.goto(f"http://127.0.0.1:{server.port}/")
    ready(page)
    setting = "(on) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.page.evaluate(setting, vue)
    there = page.page.get_by_text("diff2flow_nodes", exact=True)
    if not there.count():  # the first visit shows it by itself
        page.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    there.first.click()
    page.page.get_by_text(TEMPLATE, exact=True).last.click()
    page.page.wait_for_function(f"() => {TRAIN}", timeout=30_000)
    page.page.wait_for_timeout(1500)


def fill(page: Page, name: str) -> None:
    """What the demo changes for the tiny prior, and samples in mid-run."""
    grid = {"step_counts": "25, 8, 4, 2" if PRIOR else "2"}
    changes: dict[str, dict[str, Any]] = {
        "Watch": {"prompts": "a handwritten three\na handwritten seven", "sample_every": max(2, STEPS // 20),
                  "sample_steps": "8" if PRIOR else "2", "cfg": 3.0, "width": 64, "height": 64,
                  "validate_every": max(2, STEPS // 20), "held_out_share": 0.1},
        "Train": {"output_name": name, "steps": STEPS}, "Before": grid, "After": grid,
    }  # fmt: skip
    for title in GOLDEN | changes:
        inputs = GOLDEN.get(title, {}) | changes.get(title, {})
        page.page.evaluate(FILL, [title, inputs])
    page.page.wait_for_timeout(2500)  # ComfyUI keeps what is on the page for a reload


def run(page: Page) -> None:
    """Presses Run."""
    page.page.get_by_role("button", name="Run", exact=True).first.click()


def ready(page: Page) -> None:
    page.page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.setting", timeout=120_000)
    page.page.wait_for_timeout(3000)


def look(page: Page, name: str, at: str = LOOK) -> None:
    """Looks at the train node, or at something else, and keeps a picture of it."""
    page.page.set_viewport_size({"width": 2200, "height": 1700} if at == FIT else {"width": 1200, "height": 1000})
    page.page.evaluate(at)
    page.page.wait_for_timeout(700)
    if SHOTS:
        page.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def wait_for(page: Page, *begins: str) -> None:
    """Until the panel's headline begins in one of these ways."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        headline = page.page.locator(".d2f-headline").first.inner_text()
        if headline.startswith(begins):
            return
        assert not headline.startswith("Stopped by"), page.page.locator(".d2f-note").inner_text()
        page.page.wait_for_timeout(100)
    raise AssertionError(f"the panel says '{headline}', not {begins}")


def ours(page: Page) -> list[str]:
    """Complaints of the console that are about this pack."""
    return [text for text in page.complaints if "diff2flow" in text.lower() or "d2f" in text]


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_a_template_trains_is_reloaded_stops_saves_and_goes_on(server: ComfyServer, opened: Any, renderer: str) -> None:
    if renderer == "vue" and not server.has_vue_nodes():
        pytest.skip("the experimental Vue nodes of this ComfyUI show no pack's own widgets, and no text fields")
    page, name = Page(opened, 1200, 1000), f"panel_{renderer}"
    lora = server.base / "models" / "loras" / f"{name}.safetensors"
    open_template(page, server, renderer == "vue")
    fill(page, name)
    wait_for(page, "Not trained yet", "Finished")  # the other renderer's run is remembered
    look(page, f"{name}_0_template", FIT)
    look(page, f"{name}_0_before")
    height = page.page.evaluate(f"() => {TRAIN}.size[1]")

    run(page)
    wait_for(page, "Step")
    page.page.wait_for_function(SAMPLES, timeout=SECONDS * 1000)
    look(page, f"{name}_1_running")
    assert page.page.evaluate(CURVE) > 50 and page.page.evaluate(f"() => {TRAIN}.size[1]") == height

    page.page.get_by_role("button", name="Save now").click()
    wait_until(lambda: lora.is_file(), page)
    page.page.reload()
    ready(page)
    wait_for(page, "Step")
    page.page.wait_for_function(SAMPLES)
    look(page, f"{name}_2_reloaded")
    assert page.page.evaluate(CURVE) > 50

    lora.unlink()
    page.page.get_by_role("button", name="Stop and save").click()
    wait_for(page, "Stopped after")
    look(page, f"{name}_3_stopped")
    assert lora.is_file()
    wait_until(lambda: images(server, 1), page)  # the workflow goes on with what was trained

    run(page)
    wait_for(page, "Finished")
    look(page, f"{name}_4_finished")
    wait_until(lambda: images(server, 2), page)
    page.page.wait_for_timeout(3000)
    look(page, f"{name}_5_images", FIT)
    shutil.rmtree(server.base / "output" / "finetune")
    assert ours(page) == []
    page.page.close()


def wait_until(holds: Callable[[], Any], page: Page) -> None:
    """Until something holds; AssertionError after SECONDS."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, page.page.locator(".d2f-headline").first.inner_text()
        page.page.wait_for_timeout(100)


def images(server: ComfyServer, runs: int) -> bool:
    """Whether the workflow has saved its images so often: those of 4 digits each."""
    return len(list((server.base / "output" / "finetune").glob("image*.png"))) >= 4 * runs
