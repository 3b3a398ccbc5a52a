"""ComfyUI's progress bar on the running node."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.utils

_PREVIEW_SIZE = 512


class ComfyProgress:
    """Bar, preview and interruption of the running node."""

    def __init__(self, total: int, title: str) -> None:
        self._total, self._bar = total, comfy.utils.ProgressBar(total)

    def update(self, done: int, text: str = "", preview: Any = None) -> None:
        """Shows progress; raises ComfyUI's InterruptProcessingException when the user pressed Cancel."""
        shown = None if preview is None else ("JPEG", preview, _PREVIEW_SIZE)
        self._bar.update_absolute(done, self._total, shown)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def event(self, entry: Mapping[str, Any]) -> None:
        """Sends "diff2flow.train" to the page that queued the prompt, with the running node's id."""
        server = getattr(sys.modules.get("server"), "PromptServer", None)
        instance = getattr(server, "instance", None)
        if instance is not None:
            instance.send_sync("diff2flow.train", {"node": instance.last_node_id, **entry}, instance.client_id)

    def close(self) -> None:
        """Nothing is left open."""
