"""The panels' server without ComfyUI: the web folder, `hosts/comfy/routes.py`, stand-ins for ComfyUI's scripts."""

from __future__ import annotations

import io
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from diff2flow_nodes.hosts.page import Board, Place

ROOT = Path(__file__).resolve().parent.parent
TRAIN, PAIRS = Place("train"), Place("pairs")


class PanelServer:
    """Serves the panels' test page with a board of its own. Use as a context manager."""

    def __init__(self) -> None:
        self.board = Board()

    def __enter__(self) -> PanelServer:
        board = self.board

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given, directory=str(ROOT))

            def do_GET(self) -> None:
                _, first, *rest = urlsplit(self.path).path.split("/")
                if first == "scripts":
                    member = rest[0].removesuffix(".js")
                    script = f"export const {member} = window.comfy.{member};".encode()
                    _answer(self, 200, "text/javascript", script)
                elif first == "extensions":
                    self.path = "/".join(["/web", *rest[1:]])
                    super().do_GET()
                elif first == "diff2flow":
                    _answer(self, *_found(board, rest, parse_qs(urlsplit(self.path).query)))
                else:
                    super().do_GET()

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["command"]
                heard = board.ask(Place(urlsplit(self.path).path.split("/")[-1]), asked)
                refusal = {"error": "this node is not training now"}
                _answer(self, 200 if heard else 409, "application/json", json.dumps({} if heard else refusal).encode())

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}/tests/panel_page.html"
        self.node_address = self.address.replace("panel_page", "panel_nodes_page")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _found(board: Board, path: list[str], query: dict[str, list[str]]) -> tuple[int, str, bytes]:
    kind, node, *number = path
    if kind == "history":
        history = board.history(Place(node), int(query.get("after", ["0"])[0]))
        return 200, "application/json", json.dumps(history).encode()
    picture = board.picture(Place(node), int(number[0]))
    return (200, "image/jpeg", picture) if picture else (404, "text/plain", b"")


def _answer(handler: SimpleHTTPRequestHandler, status: int, kind: str, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def begin(board: Board, steps: int = 2000, place: Place = TRAIN) -> dict[str, Any]:
    """A run begins on a train node; what was told."""
    return board.tell(place, {"kind": "begin", "name": "golden_digits", "step": 0, "steps": steps})


def trained(board: Board, first: int, last: int, steps: int = 2000, place: Place = TRAIN) -> list[dict[str, Any]]:
    """Steps of a run as they are recorded: noisy falling loss, validation, pictures; what was told."""
    told = []
    for step in range(first, last + 1):
        noise = ((step * 2654435761) % 1000) / 1000 - 0.5
        numbers = {"loss": 0.32 + 0.6 / (1 + step / 40) + 0.18 * noise, "learning_rate": 1e-4 * min(1.0, step / 50),
                   "grad_norm": 0.4 + 0.3 / (1 + step / 60) + 0.2 * abs(noise)}  # fmt: skip
        time = {"steps_per_second": 3.2, "seconds_left": (steps - step) / 3.2}
        told.append(board.tell(place, {"kind": "step", "step": step, **numbers, **time}))
        if step % 40 == 0:
            told.append(board.tell(place, {"kind": "validation", "step": step, "loss": 0.36 + 0.5 / (1 + step / 40)}))
        if step % 25 == 0:
            told.append(board.tell(place, {"kind": "picture", "step": step, "width": 256, "height": 64}, picture(step)))
    return told


def picture(step: int) -> bytes:
    """A JPEG whose colour depends on the step."""
    file = io.BytesIO()
    Image.new("RGB", (256, 64), (step % 255, 90, 255 - step % 255)).save(file, format="JPEG")
    return file.getvalue()
