"""The panels in a real Chromium, without ComfyUI: fed as the server feeds them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, missing
from panel_server import PAIRS, TRAIN, PanelServer, begin, trained

if missing():
    pytest.skip(missing(), allow_module_level=True)

SHOTS = os.environ.get("PANEL_SHOTS")
"""Folder for pictures of what the tests see; none without."""
PIXELS = """() => {
  const canvas = document.createElement('canvas'), shown = document.querySelector('.d2f-chart canvas');
  [canvas.width, canvas.height] = [shown.width, shown.height];
  const copy = canvas.getContext('2d', {willReadFrequently: true});
  copy.drawImage(shown, 0, 0);
  const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  const near = (i, c) => Math.abs(data[i] - c[0]) + Math.abs(data[i + 1] - c[1]) + Math.abs(data[i + 2] - c[2]) < 40;
  const places = [...Array(data.length / 4).keys()].map((i) => 4 * i);
  const count = (colour) => places.filter((i) => data[i + 3] > 200 && near(i, colour)).length;
  return {smooth: count([78, 168, 255]), validation: count([255, 180, 84])};
}"""


@pytest.fixture
def server() -> Iterator[PanelServer]:
    with PanelServer() as running:
        yield running


@pytest.fixture
def seen(opened: Any, server: PanelServer) -> Iterator[Page]:
    page = Page(opened)
    load(page, server)
    yield page
    assert page.complaints == []
    page.page.close()


def load(page: Page, server: PanelServer) -> None:
    page.page.goto(server.address)
    page.page.wait_for_selector("body[data-ready]")


def feed(page: Page, entries: list[dict[str, Any]], node: str = "train") -> None:
    """Entries as the websocket brings them, and the frame after."""
    page.page.evaluate("([node, entries]) => entries.forEach((e) => links[node].hear(e))", [node, entries])
    frame(page)


def frame(page: Page) -> None:
    page.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def shot(page: Page, name: str) -> None:
    if SHOTS:
        page.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def text(page: Page, selector: str) -> str:
    return page.page.locator(selector).first.inner_text()


def boxes(page: Page) -> Any:
    """Where the panel's parts lie."""
    return page.page.evaluate(
        "() => [...document.querySelectorAll('.d2f-panel, .d2f-panel > *')].map((e) => {"
        " const {x, y, width, height} = e.getBoundingClientRect(); return [x, y, width, height]; })"
    )


def test_before_the_first_run_it_says_what_to_do(seen: Page) -> None:
    assert text(seen, "#train .d2f-headline") == "Not trained yet" and "Press Run" in text(seen, "#train .d2f-note")
    assert text(seen, "#pairs .d2f-headline") == "No pairs made yet"
    buttons = seen.page.locator("#train .d2f-foot button")
    assert [buttons.nth(i).is_disabled() for i in range(2)] == [True, True]
    assert all(seen.page.locator("button").nth(i).get_attribute("title") for i in range(5))
    shot(seen, "empty")


def test_the_chart_draws_and_nothing_moves(seen: Page, server: PanelServer) -> None:
    before = boxes(seen)
    assert seen.page.evaluate(PIXELS) == {"smooth": 0, "validation": 0}
    begin(server.board)
    feed(seen, [*server.board.history(TRAIN)["entries"], *trained(server.board, 1, 312)])
    assert text(seen, "#train .d2f-headline") == "Step 312 of 2000"
    drawn = seen.page.evaluate(PIXELS)
    assert drawn["smooth"] > 200 and drawn["validation"] > 20
    tiles = seen.page.locator("#train dd").all_inner_texts()
    assert tiles[2:] == ["1.0e-4", tiles[3], "3.2 it/s", "8:48"] and float(tiles[0]) < 0.5 and float(tiles[1]) < 0.5
    after = boxes(seen)
    assert after == before
    panel, *parts = after[:7]
    assert all(y + height <= panel[1] + panel[3] - 8 for _, y, _, height in parts)
    shot(seen, "running")


def test_the_chart_shows_learning_rate_and_gradient(seen: Page, server: PanelServer) -> None:
    begin(server.board)
    trained(server.board, 1, 120)
    load(seen, server)
    for name, legend in (("Learning rate", "learning rate 1.0e-4"), ("Gradient norm", "gradient norm 0.")):
        seen.page.get_by_role("button", name=name).click()
        frame(seen)
        assert text(seen, "#train .d2f-legend").startswith(legend)
        assert seen.page.get_by_role("button", name=name).get_attribute("aria-pressed") == "true"
        shot(seen, name.split()[0].lower())


def test_the_legend_reads_under_the_mouse_in_a_zoomed_node(seen: Page, server: PanelServer) -> None:
    begin(server.board)
    trained(server.board, 1, 101)
    load(seen, server)
    frame(seen)
    seen.page.evaluate(
        "() => { document.body.style.transformOrigin = '0 0'; document.body.style.transform = 'scale(0.5)'; }"
    )
    seen.page.evaluate("() => { panels.train.chart.plot.syncRect(true); }")
    place = seen.page.locator("#train .u-over").bounding_box()
    seen.page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    assert abs(seen.page.evaluate("() => panels.train.run.points.steps[panels.train.chart.plot.cursor.idx]") - 51) <= 1


def test_the_strip_scrolls_and_follows_the_newest(seen: Page, server: PanelServer) -> None:
    begin(server.board)
    trained(server.board, 1, 300)
    load(seen, server)
    seen.page.wait_for_function(
        "() => [...document.images].length === 12 && [...document.images].every((i) => i.naturalWidth)"
    )
    feed(seen, trained(server.board, 301, 325))
    assert text(seen, ".d2f-sample:last-child span") == "step 325"
    left = "() => document.querySelector('.d2f-strip').scrollLeft"
    end = seen.page.evaluate(left)
    assert end > 100
    seen.page.locator(".d2f-strip").hover()
    seen.page.mouse.wheel(0, -400)
    seen.page.wait_for_function(f"() => ({left})() <= {end} - 300")
    there = seen.page.evaluate(left)
    feed(seen, trained(server.board, 326, 350))
    assert seen.page.evaluate(left) == there  # whoever looks back is left alone
    shot(seen, "strip")


@pytest.mark.parametrize(("name", "command"), [("Save now", "save"), ("Stop and save", "stop")])
def test_the_buttons_ask_the_server(seen: Page, server: PanelServer, name: str, command: str) -> None:
    begin(server.board)
    trained(server.board, 1, 30)
    load(seen, server)
    frame(seen)
    with seen.page.expect_response("**/diff2flow/command/train") as answer:
        seen.page.get_by_role("button", name=name).click()
    assert answer.value.ok and server.board.asked(TRAIN) == command
    frame(seen)
    assert (
        "after this step" in text(seen, "#train .d2f-headline")
        and seen.page.get_by_role("button", name=name).is_disabled()
    )


def test_a_run_says_why_it_is_not_the_one_before(seen: Page, server: PanelServer) -> None:
    begin(server.board, 50)
    told = "the run 'digits' is not continued: clip skip: -2 there, -1 here; 'digits_00002' begins anew"
    server.board.tell(TRAIN, {"kind": "note", "step": 0, "text": told})
    load(seen, server)
    frame(seen)
    assert text(seen, "#train .d2f-note") == told
    feed(seen, [server.board.tell(TRAIN, {"kind": "end", "step": 50, "steps": 50})])
    feed(seen, [server.board.tell(TRAIN, {"kind": "saved", "step": 50, "name": "digits_00002"})])
    assert text(seen, "#train .d2f-note") == f"Saved as digits_00002; {told}"


def test_a_finished_run_says_where_it_is(seen: Page, server: PanelServer) -> None:
    begin(server.board, 50)
    trained(server.board, 1, 50, 50)
    server.board.tell(TRAIN, {"kind": "end", "step": 50, "steps": 50})
    load(seen, server)
    frame(seen)
    assert text(seen, "#train .d2f-headline") == "Step 50 of 50 · saving"
    feed(seen, [server.board.tell(TRAIN, {"kind": "saved", "step": 50, "name": "golden_digits.safetensors"})])
    assert text(seen, "#train .d2f-headline") == "Finished: 50 steps"
    assert text(seen, "#train .d2f-note") == "Saved as golden_digits.safetensors"
    shot(seen, "finished")


def test_an_error_is_shown(seen: Page, server: PanelServer) -> None:
    begin(server.board)
    trained(server.board, 1, 60)
    message = "the loss became nan at step 61 of 2000; lower learning_rate (0.1)"
    server.board.tell(TRAIN, {"kind": "failed", "error": "NonFiniteError", "message": message})
    load(seen, server)
    frame(seen)
    assert text(seen, "#train .d2f-headline") == "Stopped by an error" and text(seen, "#train .d2f-note") == message
    assert not seen.page.get_by_role("button", name="Stop and save").is_visible()
    shot(seen, "error")


def test_a_reload_in_mid_run_restores_everything(seen: Page, server: PanelServer) -> None:
    begin(server.board)
    feed(seen, [*server.board.history(TRAIN)["entries"], *trained(server.board, 1, 200)])
    known = "() => { const {points, validation, pictures} = panels.train.run; return {points, validation, pictures}; }"
    before = seen.page.evaluate(known)
    seen.page.reload()
    seen.page.wait_for_selector("body[data-ready]")
    assert seen.page.evaluate(known) == before and len(before["points"]["steps"]) == 200
    feed(seen, trained(server.board, 201, 210))
    assert text(seen, "#train .d2f-headline") == "Step 210 of 2000"


def test_entries_during_the_reload_and_missed_ones_come_once(seen: Page, server: PanelServer) -> None:
    begin(server.board)
    trained(server.board, 1, 20)
    seen.page.evaluate("() => { window.loading = links.train.load(); }")
    feed(seen, trained(server.board, 21, 22))
    seen.page.evaluate("() => window.loading")
    trained(server.board, 23, 24)  # not heard: the websocket was away
    seen.page.evaluate("() => { links.train.heard = -1e9; return links.train.check(); }")
    assert seen.page.evaluate("() => panels.train.run.points.steps") == list(range(1, 25))


def test_a_run_that_its_server_forgot_is_said_to_be_lost(seen: Page, server: PanelServer) -> None:
    begin(server.board)
    trained(server.board, 1, 20)
    load(seen, server)
    server.board._stories.clear()
    seen.page.evaluate("() => { links.train.heard = -1e9; return links.train.check(); }")
    frame(seen)
    assert "no longer runs" in text(seen, "#train .d2f-note")


def test_a_resumed_run_shows_its_earlier_losses(seen: Page, server: PanelServer) -> None:
    server.board.tell(TRAIN, {"kind": "begin", "name": "golden_digits", "step": 100, "steps": 200})
    earlier = {"steps": list(range(10, 101, 10)), "losses": [1.0 - i / 20 for i in range(10)]}
    server.board.tell(TRAIN, {"kind": "earlier", "step": 100, **earlier})
    trained(server.board, 101, 110, 200)
    load(seen, server)
    assert seen.page.evaluate("() => panels.train.run.points.steps") == [*earlier["steps"], *range(101, 111)]


def test_a_long_run_stays_small_and_even_on_the_page(seen: Page, server: PanelServer) -> None:
    begin(server.board, 9000)
    feed(seen, trained(server.board, 1, 9000, 9000))
    steps = seen.page.evaluate("() => panels.train.run.points.steps")
    assert 1200 <= len(steps) <= 2400 and steps[0] == 1 and steps[-1] == 9000
    assert {b - a for a, b in zip(steps, steps[1:-1], strict=False)} == {4}


def test_pairs_show_how_far_they_are(seen: Page, server: PanelServer) -> None:
    entry = {"kind": "pairs", "total": 400, "steps_per_second": 0.5, "seconds_left": 4000.0}
    feed(seen, [server.board.tell(PAIRS, {**entry, "done": 100})], "pairs")
    assert text(seen, "#pairs .d2f-headline") == "Making pairs"
    assert seen.page.locator("#pairs dd").all_inner_texts() == ["100 / 400", "2.0 s/it", "1:06:40"]
    assert seen.page.locator("#pairs .d2f-bar").get_attribute("aria-valuenow") == "25"
    shot(seen, "pairs")
    feed(seen, [server.board.tell(PAIRS, {**entry, "done": 400, "seconds_left": 0.0})], "pairs")
    assert text(seen, "#pairs .d2f-headline") == "All pairs are made"
