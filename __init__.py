"""Diff2Flow nodes: any Stable Diffusion checkpoint as a flow matching model, inside ComfyUI or headless."""

from typing import Any

WEB_DIRECTORY = "./web"
__version__ = "0.1.0"
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]


def __getattr__(name: str) -> Any:
    """The mappings, imported when ComfyUI asks for them: the command line answers sooner without torch."""
    if name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"):
        from . import hosts, nodes

        if name == "NODE_CLASS_MAPPINGS":
            hosts.serve_page()
        return getattr(nodes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
