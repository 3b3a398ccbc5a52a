"""The headless host: runs API-format workflows without ComfyUI, on diffusers and transformers."""

from .host import HeadlessHost

__all__ = ["HeadlessHost"]
