"""Hosts: what differs between ComfyUI and the headless runner, behind one port (`hosts.port.Host`)."""

from __future__ import annotations

import sys
from typing import Any

from .port import Host, HostError, ModelFacts

__all__ = ["Host", "HostError", "ModelFacts", "current", "serve_page", "use"]

_chosen: list[Any] = []


def use(host: Host) -> None:
    """Makes `host` the one that the nodes talk to in this process."""
    _chosen[:] = [host]


def current() -> Host:
    """The host the nodes run in: the one chosen by `use`, else ComfyUI."""
    if not _chosen:
        from .comfy import ComfyHost

        use(ComfyHost())
    return _chosen[0]


def serve_page() -> None:
    """Lets ComfyUI's server answer the page's panels; without that server nothing happens."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        from .comfy.routes import add_routes

        add_routes(server.routes)
