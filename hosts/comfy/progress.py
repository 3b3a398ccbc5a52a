"""ComfyUI's progress bar on the running node, and what the page is told of it.

Previews go to the node's panel alone: ComfyUI's own preview would make the node jump, and show them twice.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.utils

from ..page import Place, board

_PREVIEW_SIZE, _QUALITY = 512, 85
_SECONDS = 0.25
_FREQUENT = ("status", "pairs")
"""Kinds of which at most one in _SECONDS is sent; `training.record.Events` does the same for steps."""


class ComfyProgress:
    """Bar, interruption and page of the running node."""

    def __init__(self, total: int, title: str) -> None:
        self._total, self._title, self._bar = total, title, comfy.utils.ProgressBar(total)
        self._place = running_place()
        self._own_words = False
        self._held: Mapping[str, Any] | None = None
        self._sent = -_SECONDS

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        """Shows progress; raises ComfyUI's InterruptProcessingException when the user pressed Cancel."""
        self._bar.update_absolute(done, self._total)
        if preview is not None:
            size = {"width": preview.width, "height": preview.height}
            self._send({"kind": "picture", "step": done, **size}, _jpeg(preview))
        elif not self._own_words:
            self._tell({"kind": "status", "title": self._title, "text": text, "done": done, "total": self._total})
        comfy.model_management.throw_exception_if_processing_interrupted()

    def event(self, entry: Mapping[str, Any]) -> None:
        """Tells the page that queued the prompt, and keeps it for one that comes later."""
        self._own_words = True
        self._tell(entry)

    def command(self) -> str:
        """What the page asked for since the last call."""
        return board.asked(self._place)

    def close(self) -> None:
        """The last that was held back is sent."""
        self._flush()

    def _tell(self, entry: Mapping[str, Any]) -> None:
        """Sends an entry; a frequent one is held back if another was sent just now."""
        now = time.monotonic()
        if entry["kind"] not in _FREQUENT:
            self._flush()
        elif now - self._sent < _SECONDS:
            self._held = entry
            return
        else:
            self._held, self._sent = None, now
        self._send(entry)

    def _flush(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._send(held)

    def _send(self, entry: Mapping[str, Any], picture: bytes | None = None) -> None:
        told = board.tell(self._place, entry, picture)
        server = page_server()
        if server is not None:
            server.send_sync("diff2flow.train", told, server.client_id)


def page_server() -> Any:
    """ComfyUI's server, None where none runs."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def running_place() -> Place:
    """Of the node that runs now."""
    return Place(_running_node(), _running_workflow())


def _running_node() -> str:
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    if context is not None:
        return str(context.node_id)
    return str(getattr(page_server(), "last_node_id", ""))


def _running_workflow() -> str:
    """Id of the workflow that the page sent along with the prompt."""
    queue = getattr(page_server(), "prompt_queue", None)
    try:
        [(_, _, _, extra, *_)] = list(getattr(queue, "currently_running", {}).values())
        return str(extra["extra_pnginfo"]["workflow"]["id"])
    except (KeyError, TypeError, ValueError):  # queued without a page
        return ""


def _jpeg(picture: Any) -> bytes:
    small = picture.convert("RGB")
    small.thumbnail((_PREVIEW_SIZE, _PREVIEW_SIZE))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=_QUALITY)
    return file.getvalue()
