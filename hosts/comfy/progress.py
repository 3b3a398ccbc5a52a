"""ComfyUI's progress bar on the running node."""

from __future__ import annotations

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

    def close(self) -> None:
        """Nothing is left open."""
