"""The training panel in the real ComfyUI, driven in a real Chromium; needs COMFYUI_DIR, Playwright and Chromium."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, browser, missing
from comfy_graphs import Graph, base, node, training
from comfy_server import ComfyServer, comfy_dir
from PIL import Image

from diff2flow_nodes.bench.random_prior import build_random

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

CHECKPOINT = "random.safetensors"
STEPS, SECONDS = int(os.environ.get("PANEL_STEPS", "60")), 240
SHOTS = os.environ.get("PANEL_SHOTS")
"""Folder for pictures of what the tests see; none without."""
TRAIN = "app.graph.nodes.find((node) => node.comfyClass === 'Diff2FlowTrain')"
LOOK = f"""() => {{
  const node = {TRAIN}, view = app.canvas.ds;
  view.scale = 0.8;
  view.offset = [-node.pos[0] + 200, -node.pos[1] + 70];
  app.canvas.setDirty(true, true);
}}"""
CURVE = """() => {
  const canvas = document.querySelector('.d2f-chart canvas');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const near = (i) => Math.abs(data[i] - 78) + Math.abs(data[i + 1] - 168) + Math.abs(data[i + 2] - 255) < 40;
  return [...Array(data.length / 4).keys()].filter((i) => data[4 * i + 3] > 200 && near(4 * i)).length;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("comfy")
    running = ComfyServer(comfy_dir(), folder)
    build_random(folder / "models" / "checkpoints" / CHECKPOINT)
    pictures = folder / "input" / "digits"
    pictures.mkdir(parents=True)
    for i in range(4):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[8 * i : 8 * i + 24, 16:48] = (200, 60 * i, 90)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"bar {i}")
    with running:
        yield running


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as running:
        yield running


def graph_of(name: str) -> Graph:
    graph = training(base(CHECKPOINT), "digits", name, steps=STEPS, batch_size=2)
    for unused in ("positive", "negative", "latent"):
        del graph[unused]
    watch = {"sample_every": 5, "validate_every": 5, "held_out_share": 0.25, "prompts": "bar 1\nbar 3"}
    size = {"sample_steps": "2", "cfg": 1.0, "width": 64, "height": 64, "seed": 1}
    graph["watch"] = node("Diff2FlowTrainWatch", vae=["ckpt", 2], clip=["ckpt", 1], **watch, **size)
    graph["train"]["inputs"]["watch"] = ["watch", 0]
    return graph


def opened_page(page: Page, server: ComfyServer, vue: bool) -> None:
    page.page.goto(f"http://127.0.0.1:{server.port}/")
    ready(page)
    page.page.evaluate("() => window.app.extensionManager.setting.set('Comfy.TutorialCompleted', true)")
    setting = "(on) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.page.evaluate(setting, vue)
    page.page.keyboard.press("Escape")  # the templates that a first visit shows


def ready(page: Page) -> None:
    page.page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.setting", timeout=120_000)
    page.page.wait_for_timeout(3000)


def look(page: Page, name: str) -> None:
    """Looks at the train node, and keeps a picture of it."""
    page.page.evaluate(LOOK)
    page.page.wait_for_timeout(700)
    if SHOTS:
        page.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def wait_for(page: Page, begins: str) -> None:
    """Until the panel's headline begins so."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        headline = page.page.locator(".d2f-headline").first.inner_text()
        if headline.startswith(begins):
            return
        assert not headline.startswith("Stopped by"), page.page.locator(".d2f-note").inner_text()
        page.page.wait_for_timeout(100)
    raise AssertionError(f"the panel says '{headline}', not '{begins}'")


def ours(page: Page) -> list[str]:
    """Complaints of the console that are about this pack."""
    return [text for text in page.complaints if "diff2flow" in text.lower() or "d2f" in text]


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
def test_it_trains_is_reloaded_stops_saves_and_goes_on(server: ComfyServer, opened: Any, renderer: str) -> None:
    page, name = Page(opened, 1280, 1000), f"panel_{renderer}"
    opened_page(page, server, renderer == "vue")
    page.page.evaluate("(graph) => app.loadApiJson(graph, 'panel')", graph_of(name))
    page.page.wait_for_timeout(2500)  # ComfyUI keeps what is on the page for a reload
    wait_for(page, "Not trained yet")
    look(page, f"{name}_0_before")
    height = page.page.evaluate(f"() => {TRAIN}.size[1]")

    page.page.evaluate("() => app.queuePrompt(0)")
    wait_for(page, "Step")
    page.page.wait_for_function("() => document.querySelectorAll('.d2f-sample').length >= 2", timeout=SECONDS * 1000)
    look(page, f"{name}_1_running")
    assert page.page.evaluate(CURVE) > 50 and page.page.evaluate(f"() => {TRAIN}.size[1]") == height

    page.page.reload()
    ready(page)
    wait_for(page, "Step")
    page.page.wait_for_function("() => document.querySelectorAll('.d2f-sample').length >= 2")
    look(page, f"{name}_2_reloaded")
    assert page.page.evaluate(CURVE) > 50

    page.page.get_by_role("button", name="Stop and save").click()
    wait_for(page, "Stopped after")
    look(page, f"{name}_3_stopped")
    assert (server.base / "models" / "loras" / f"{name}.safetensors").is_file()

    page.page.evaluate("() => app.queuePrompt(0)")
    wait_for(page, "Finished")
    look(page, f"{name}_4_finished")
    assert ours(page) == []
    page.page.close()
