"""Optimizers: torch's own, and those of kept libraries that are optional at install."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it."""
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=fused or None)


def _adamw_8bit(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bits: a quarter of their memory."""
    return _library("bitsandbytes", "adamw_8bit").optim.AdamW8bit(groups, betas=betas, weight_decay=weight_decay)


def _adafactor(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """Adafactor: second moments of a matrix by rows and columns only, no first moment."""
    return torch.optim.Adafactor(groups, weight_decay=weight_decay)


def _prodigy(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """Prodigy finds the learning rate itself; learning_rate is a factor of it, 1 as a rule."""
    return _library("prodigyopt", "prodigy").Prodigy(
        groups, betas=betas, weight_decay=weight_decay, safeguard_warmup=True, use_bias_correction=True
    )


def _schedule_free(groups: Groups, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW without a schedule: the weights to use are an average that the optimizer keeps."""
    library = _library("schedulefree", "schedule_free")
    optimizer = library.AdamWScheduleFree(groups, betas=betas, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


_MAKERS: dict[str, Callable[[Groups, tuple[float, float], float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
}
OPTIMIZERS = tuple(_MAKERS)
BYTES_PER_PARAMETER: Mapping[str, float] = {
    "adamw": 8.0,
    "adamw_8bit": 2.0,
    "adafactor": 0.1,
    "prodigy": 16.0,
    "schedule_free": 8.0,
}
"""Memory of an optimizer's state for each trained parameter."""


def build_optimizer(
    name: str, groups: Mapping[str, list[torch.nn.Parameter]], learning_rate: float, betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:  # fmt: skip
    """An optimizer over named groups of parameters; a group's name is in its dict as "name".

    Args:
        name: of OPTIMIZERS.
        groups: parameters by the group's name; empty groups are left out.
        learning_rate: until a step sets it.
        betas: decay of the running means, where the optimizer has them.
        weight_decay: towards 0, which is the base model.

    Raises:
        ValueError: the optimizer's library is not installed.
    """
    listed = [{"params": params, "lr": learning_rate, "name": title} for title, params in groups.items() if params]
    return _MAKERS[name](listed, betas, weight_decay)


@contextmanager
def weights_to_use(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """The weights to use stand in the parameters, for optimizers that train with others; put back to the bit."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = [parameter.detach().clone() for parameter in parameters]  # going there and back rounds
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), kept)


def _library(module: str, optimizer: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"optimizer '{optimizer}' needs the package '{module}', which is not installed ({error}): run"
            f" 'pip install {module}' in ComfyUI's python and restart, or choose adamw"
        ) from error
