"""ComfyUI as a host. Imported only where ComfyUI runs."""

from .host import ComfyHost

__all__ = ["ComfyHost"]
