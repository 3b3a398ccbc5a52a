"""ComfyUI's side of the panels, with ComfyUI replaced by fakes: what is sent, how often, and what the routes answer."""

from __future__ import annotations

import asyncio
import importlib
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diff2flow_nodes import hosts
from diff2flow_nodes.hosts.page import Board

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "diff2flow_nodes.hosts.comfy"


class Server:
    """ComfyUI's PromptServer: node 7 of a workflow runs."""

    def __init__(self) -> None:
        self.client_id, self.last_node_id, self.sent = "page", "7", []
        workflow = {"extra_pnginfo": {"workflow": {"id": "a-workflow"}}}
        self.prompt_queue = types.SimpleNamespace(currently_running={0: (0, "prompt", {}, workflow, [])})
        self.routes = Routes()

    def send_sync(self, event: str, data: dict[str, Any], client: str) -> None:
        self.sent.append((event, data, client))


class Routes:
    """aiohttp's table of routes."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def get(self, path: str) -> Any:
        return lambda handler: self.handlers.setdefault(path, handler)

    post = get


class Request:
    """A request of the page."""

    def __init__(self, match: dict[str, str], query: dict[str, str] | None = None, body: Any = None) -> None:
        self.match_info, self.query, self._body = match, query or {}, body

    async def json(self) -> Any:
        return self._body


class Response:
    def __init__(self, body: Any = None, status: int = 200, content_type: str = "") -> None:
        self.body, self.status, self.content_type = body, status, content_type


def module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


class Bar:
    def __init__(self, total: int) -> None:
        self.shown: list[Any] = []

    def update_absolute(self, *given: Any) -> None:
        self.shown.append(given)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Fakes of all that the two modules import, and a board of their own."""
    running, context = Server(), types.SimpleNamespace(node_id="7")
    management = module("comfy.model_management", throw_exception_if_processing_interrupted=lambda: None)
    fakes = {
        "comfy": module("comfy", model_management=management),
        "comfy.model_management": management,
        "comfy.utils": module("comfy.utils", ProgressBar=Bar),
        "comfy_execution": module("comfy_execution"),
        "comfy_execution.utils": module("comfy_execution.utils", get_executing_context=lambda: context),
        "server": module("server", PromptServer=types.SimpleNamespace(instance=running)),
        "aiohttp": module("aiohttp", web=types.SimpleNamespace(Response=Response, json_response=Response)),
        PACKAGE: module(PACKAGE, __path__=[str(ROOT / "hosts" / "comfy")]),
    }
    fakes["comfy"].utils = fakes["comfy.utils"]
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    board = Board()
    for name in ("progress", "routes"):
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
        monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.{name}"), "board", board)
    yield running
    for name in ("progress", "routes"):
        sys.modules.pop(f"{PACKAGE}.{name}", None)


def progress(total: int = 10, title: str = "Encoding digits") -> Any:
    return sys.modules[f"{PACKAGE}.progress"].ComfyProgress(total, title)


def answer(server: Server, path: str, request: Request) -> Response:
    hosts.serve_page()
    return asyncio.run(server.routes.handlers[path](request))


def history(server: Server, node: str = "7", workflow: str = "a-workflow") -> Any:
    request = Request({"node": node}, {"workflow": workflow})
    return answer(server, "/diff2flow/history/{node}", request).body


def sent(server: Server) -> list[Any]:
    return [data for _, data, _ in server.sent]


def test_entries_go_to_the_page_that_queued_with_node_and_workflow(server: Server) -> None:
    progress().event({"kind": "begin", "name": "ink", "step": 0, "steps": 9})
    [(event, data, client)] = server.sent
    assert (event, client, data["node"], data["workflow"]) == ("diff2flow.train", "page", "7", "a-workflow")
    assert (
        history(server) == {"entries": [data], "running": True, "known": True} and history(server, "8")["entries"] == []
    )


def test_a_fast_bar_sends_little_and_its_end(server: Server) -> None:
    bar = progress(1000)
    for done in range(1, 1001):
        bar.update(done, f"{done}.png")
    assert len(server.sent) < 8
    bar.close()
    assert sent(server)[-1]["done"] == 1000 and sent(server)[-1]["title"] == "Encoding digits"
    pairs = progress(1000)
    for done in range(1, 1001):
        pairs.event({"kind": "pairs", "done": done, "total": 1000})
        pairs.update(done, "so many pairs")
    pairs.close()
    told = [entry for entry in sent(server) if entry["kind"] == "pairs"]
    assert len(told) < 8 and told[-1]["done"] == 1000
    assert len([entry for entry in sent(server) if entry["kind"] == "status"]) < 8


def test_a_preview_becomes_a_small_picture_on_the_server(server: Server) -> None:
    bar = progress()
    bar.event({"kind": "begin", "name": "ink", "step": 0, "steps": 9})
    bar.update(3, "samples saved", Image.new("RGB", (1024, 256), "red"))
    told = sent(server)[-1]
    assert (told["kind"], told["step"], told["width"], told["height"]) == ("picture", 3, 1024, 256)
    request = Request({"node": "7", "number": str(told["seq"])}, {"workflow": "a-workflow"})
    found = answer(server, "/diff2flow/picture/{node}/{number}", request)
    assert found.content_type == "image/jpeg" and Image.open(io.BytesIO(found.body)).size == (512, 128)
    request.match_info["number"] = "1"
    assert answer(server, "/diff2flow/picture/{node}/{number}", request).status == 404


def test_commands_reach_the_run_and_nothing_else(server: Server) -> None:
    def post(body: Any) -> Response:
        request = Request({"node": "7"}, {"workflow": "a-workflow"}, body)
        return answer(server, "/diff2flow/command/{node}", request)

    assert post({"command": "save"}).status == 409
    bar = progress()
    bar.event({"kind": "begin", "name": "ink", "step": 0, "steps": 9})
    assert [post(body).status for body in ({"command": "rm"}, {}, [])] == [400, 400, 400] and bar.command() == ""
    assert post({"command": "stop"}).status == 200 and [bar.command(), bar.command()] == ["stop", ""]


def test_without_a_server_nothing_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server")
    progress().event({"kind": "begin", "name": "ink", "step": 0, "steps": 9})
    hosts.serve_page()
    assert server.sent == [] and server.routes.handlers == {}


@pytest.mark.parametrize("extra", [{}, {"extra_pnginfo": None}, {"extra_pnginfo": {"workflow": {}}}, None])
def test_a_prompt_queued_without_a_page_has_no_workflow(server: Server, extra: Any) -> None:
    server.prompt_queue.currently_running = {0: (0, "prompt", {}, extra, [])}
    progress().event({"kind": "begin", "name": "ink", "step": 0, "steps": 9})
    assert sent(server)[0]["workflow"] == "" and history(server)["running"]
