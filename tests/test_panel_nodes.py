"""The panels as `web/diff2flow.js` puts them into nodes, in Chromium with stand-ins for ComfyUI's app and api."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Page, missing
from panel_server import PanelServer, begin, trained

from diff2flow_nodes.hosts.page import Place

if missing():
    pytest.skip(missing(), allow_module_level=True)

OWN, INNER = Place("7"), Place("5:3")


@pytest.fixture
def server() -> Iterator[PanelServer]:
    with PanelServer() as running:
        yield running


@pytest.fixture
def seen(opened: Any, server: PanelServer) -> Iterator[Page]:
    begin(server.board, place=INNER)
    trained(server.board, 1, 30, place=INNER)
    page = Page(opened)
    page.page.goto(server.node_address)
    page.page.wait_for_selector("body[data-ready]")
    page.page.wait_for_load_state("networkidle")  # the histories that the panels ask for have been answered
    yield page
    assert page.complaints == []
    page.page.close()


def say(page: Page, name: str, detail: Any) -> None:
    page.page.evaluate("([name, detail]) => say(name, detail)", [name, detail])


def headline(page: Page, node: int) -> str:
    page.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.page.locator(f"#node-{node} .d2f-headline").inner_text()


def test_nodes_get_their_panels_and_room_for_them(seen: Page) -> None:
    widgets = "() => Object.fromEntries(Object.values(nodes).map((n) => [n.id, n.widgets.map((w) => w.serialize)]))"
    assert seen.page.evaluate(widgets) == {"3": [False], "5": [], "7": [False], "8": [False], "9": []}
    assert seen.page.evaluate("() => [nodes[7].size, nodes[9].size]") == [[400, 572], [200, 100]]


def test_a_node_in_a_subgraph_has_its_history_and_its_pictures(seen: Page) -> None:
    assert headline(seen, 3) == "Step 30 of 2000" and headline(seen, 7) == "Not trained yet"
    seen.page.wait_for_function("() => document.querySelector('#node-3 img').naturalWidth === 256")
    with seen.page.expect_response("**/diff2flow/command/5:3*") as answer:
        seen.page.locator("#node-3").get_by_role("button", name="Save now").click()
    assert answer.value.ok


def test_entries_reach_their_node_and_those_of_other_workflows_none(seen: Page, server: PanelServer) -> None:
    told = [begin(server.board, place=OWN), *trained(server.board, 1, 12, place=OWN)]
    say(seen, "diff2flow.train", {**told[0], "workflow": "another"})
    assert headline(seen, 7) == "Not trained yet"
    for entry in told:
        say(seen, "diff2flow.train", entry)
    assert headline(seen, 7) == "Step 12 of 2000" and headline(seen, 3) == "Step 30 of 2000"


def test_messages_are_heard_before_the_page_is_set_up(seen: Page) -> None:
    """ComfyUI connects first, and warns on the console of a message that nobody listens for."""
    assert seen.page.evaluate("() => heardAtOnce") == ["diff2flow.train"]


def test_a_graph_without_an_id_asks_for_its_node_alone(seen: Page) -> None:
    seen.page.evaluate("() => { comfy.app.rootGraph.id = '00000000-0000-0000-0000-000000000000'; }")
    with seen.page.expect_request(lambda request: request.url.endswith("/diff2flow/history/7?workflow=")):
        say(seen, "reconnected", None)


def test_training_waits_for_the_dataset_and_says_so(seen: Page) -> None:
    status = {"kind": "status", "node": "9", "workflow": "a-workflow", "seq": 1, "title": "Encoding digits", "text": ""}
    say(seen, "executing", "9")
    say(seen, "diff2flow.train", {**status, "done": 12, "total": 100})
    assert headline(seen, 7) == "Encoding digits · 12 of 100" and headline(seen, 3) == "Step 30 of 2000"
    say(seen, "executing", "7")
    assert headline(seen, 7) == "Getting the model ready"
    say(seen, "executing", None)
    assert headline(seen, 7) != "Getting the model ready"


def test_failures_are_shown_where_they_hit(seen: Page) -> None:
    status = {"kind": "status", "node": "9", "workflow": "", "seq": 1, "title": "Encoding digits", "text": "one.png"}
    say(seen, "diff2flow.train", {**status, "done": 0, "total": 100})
    failure = {"exception_type": "ValueError", "exception_message": "folder: there is none\n", "node_type": "KSampler"}
    say(seen, "execution_error", {**failure, "node_id": "9"})
    assert headline(seen, 7) == "Stopped by an error"
    assert seen.page.locator("#node-7 .d2f-note").inner_text() == "KSampler: folder: there is none"
    say(seen, "executing", "8")
    say(seen, "execution_interrupted", {"node_id": "8", "node_type": "Diff2FlowReflowPairs"})
    assert headline(seen, 8) == "Cancelled; finished pairs are kept"


def test_a_removed_node_lets_its_panel_go(seen: Page, server: PanelServer) -> None:
    seen.page.evaluate("() => nodes[7].onRemoved()")
    say(seen, "diff2flow.train", begin(server.board, place=OWN))
    assert headline(seen, 7) == "Not trained yet"


def test_a_recipe_shows_what_is_usually_changed_and_expert_everything(seen: Page) -> None:
    values = {"objective": "diff2flow", "steps": 9, "recipe": "finetune", "resume": "auto", "save_every": 250}
    seen.page.evaluate("(values) => { window.train = added(20, 'Diff2FlowTrain', values); }", values)
    shown = "() => train.widgets.filter((w) => !w.hidden && !w.options?.hidden).map((w) => w.name)"
    seen.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert seen.page.evaluate(shown) == ["steps", "recipe", "diff2flow_panel"]
    rowless = "() => train.widgets.filter((w) => w.computeSize?.()[1] === -4).map((w) => w.name)"
    assert seen.page.evaluate(rowless) == ["objective", "resume", "save_every"]
    small = seen.page.evaluate("() => train.size[1]")
    choose = (
        "(value) => { const w = train.widgets.find((w) => w.name === 'recipe'); w.value = value; w.callback(value); }"
    )
    seen.page.evaluate(choose, "expert")
    assert (
        seen.page.evaluate(shown) == [*values, "diff2flow_panel"] and seen.page.evaluate("() => train.told") == "expert"
    )
    assert seen.page.evaluate(rowless) == []
    assert seen.page.evaluate("() => train.size[1]") == small + 3 * 20
    seen.page.evaluate("() => { train.inputs.push({ widget: { name: 'resume' }, link: 4 }); }")
    seen.page.evaluate(choose, "depth")
    assert seen.page.evaluate(shown) == ["steps", "recipe", "resume", "diff2flow_panel"]


def test_widgets_without_effect_are_hidden_while_they_have_none(seen: Page) -> None:
    """By the table of `nodes.effects`, through what ComfyUI's server tells the page of a class."""
    define = "([name, input]) => extension.beforeRegisterNodeDef(null, { name, input })"
    for name in ("Diff2FlowReflowRecipe", "Diff2FlowTrainWatch"):
        seen.page.evaluate(define, [name, _object_info(name)])
    values = {"recipe": "fast", "drop_worst": 0.2, "consistency": 0, "windows": 7, "teacher_cfg": 7.5}
    seen.page.evaluate("(values) => { window.made = added(30, 'Diff2FlowReflowRecipe', values); }", values)
    settle = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    seen.page.evaluate(settle)
    shown = "() => made.widgets.filter((w) => !w.hidden && !w.options?.hidden).map((w) => w.name)"
    choose = """([name, value]) => {
      const widget = made.widgets.find((each) => each.name === name);
      widget.value = value;
      widget.callback(value);
    }"""
    assert seen.page.evaluate(shown) == ["recipe", "drop_worst", "consistency"]
    small = seen.page.evaluate("() => made.size[1]")
    seen.page.evaluate(choose, ["recipe", "windows"])
    assert seen.page.evaluate(shown) == ["recipe", "windows", "teacher_cfg"]
    seen.page.evaluate(choose, ["recipe", "paper"])
    assert seen.page.evaluate(shown) == ["recipe", "consistency"]
    assert seen.page.evaluate("() => made.size[1]") == small - 20
    assert seen.page.evaluate("() => Object.fromEntries(made.widgets.map((w) => [w.name, w.value]))") == {
        **values,
        "recipe": "paper",
    }

    values = {
        "sample_every": 0,
        "prompts": "",
        "sample_steps": "4",
        "cfg": 1.0,
        "seed": 0,
        "negative": "",
        "solver": "e",
    }
    values |= {"validate_every": 0, "held_out_share": 0.1}
    sockets = ["validation", "images"]
    seen.page.evaluate(
        "([values, sockets]) => { window.made = added(31, 'Diff2FlowTrainWatch', values, sockets); }", [values, sockets]
    )
    seen.page.evaluate(settle)
    assert seen.page.evaluate(shown) == ["sample_every", "validate_every"]
    seen.page.evaluate(choose, ["sample_every", 50])
    assert set(seen.page.evaluate(shown)) == set(values) - {"negative", "held_out_share"}
    seen.page.evaluate(choose, ["cfg", 2.5])
    assert set(seen.page.evaluate(shown)) == set(values) - {"held_out_share"}
    seen.page.evaluate("() => { made.inputs[1].link = 5; made.onConnectionsChange(1, 1, true); }")
    assert seen.page.evaluate(shown) == ["sample_every", "sample_steps", "seed", "solver", "validate_every"]
    seen.page.evaluate("() => { made.inputs.push({ name: 'cfg', widget: { name: 'cfg' }, link: 9 }); }")
    seen.page.evaluate(choose, ["validate_every", 10])
    assert "cfg" in seen.page.evaluate(shown) and "held_out_share" in seen.page.evaluate(shown)


def _object_info(name: str) -> Any:
    """The inputs of a class as they come from ComfyUI's server."""
    from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS

    return json.loads(json.dumps(NODE_CLASS_MAPPINGS[name].INPUT_TYPES()))
