"""What the page asks ComfyUI's server: a node's history, its pictures, and to save or stop."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ..page import Place, board


def add_routes(routes: Any) -> None:
    """Adds them to the server's table; before the server starts."""
    routes.get("/diff2flow/history/{node}")(history)
    routes.get("/diff2flow/picture/{node}/{number}")(picture)
    routes.post("/diff2flow/command/{node}")(command)


async def history(request: Any) -> Any:
    """{"entries": [...], "running": bool, "known": bool}; ?after=<seq> leaves out what is known."""
    return web.json_response(board.history(_place(request), _number(request.query.get("after", ""))))


async def picture(request: Any) -> Any:
    """A sample as JPEG; 404 where it is forgotten."""
    jpeg = board.picture(_place(request), _number(request.match_info["number"]))
    return web.Response(status=404) if jpeg is None else web.Response(body=jpeg, content_type="image/jpeg")


async def command(request: Any) -> Any:
    """{"command": "save" | "stop"}; 409 where no run is on that could hear it, 400 for another command."""
    try:
        heard = board.ask(_place(request), str((await request.json()).get("command")))
    except (ValueError, AttributeError) as error:
        return web.json_response({"error": str(error)}, status=400)
    if not heard:
        return web.json_response({"error": "this node is not training now"}, status=409)
    return web.json_response({})


def _place(request: Any) -> Place:
    return Place(request.match_info["node"], request.query.get("workflow", ""))


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
