"""The headless host: runs API-format workflows without ComfyUI, on diffusers and transformers (imported when needed)."""

from .host import HeadlessHost

__all__ = ["HeadlessHost"]
