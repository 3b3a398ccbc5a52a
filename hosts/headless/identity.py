"""What tells two MODELs, CLIPs and VAEs of the headless host apart."""

from __future__ import annotations

from typing import Any

from ...training.identity import Identity
from ..fingerprint import digest
from .autoencoder import Autoencoder
from .model import Model


def fingerprint(thing: Any) -> Identity:
    """The identity of a MODEL, CLIP or VAE: samples of its weights and patches, and what else is set on it."""
    weights = thing.base.weights if isinstance(thing, Model) else getattr(thing, "weights", None)
    patches = {f"{i}:{name}": t for i, p in enumerate(getattr(thing, "patches", ())) for name, t in p.tensors().items()}
    return Identity(digest((weights.module if weights else thing.module).state_dict(), patches), _settings(thing))


def _settings(thing: Any) -> dict[str, str]:
    if isinstance(thing, Autoencoder):
        return {name: f"{value:g}" for name, value in thing.factors.items() if value != thing.USUAL[name]}
    if isinstance(thing, Model) and thing.facts.schedule != thing.base.schedule:
        return {"noise schedule": thing.facts.schedule.describe()}
    return {}
