"""Which patches on a ComfyUI MODEL hold limits in the sigma of the model that they were made for."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch

_LIMIT = re.compile(r"sigma.*(start|end|min|max|hi|lo|from|to)|(start|end|min|max|hi|lo|from|to).*sigma", re.IGNORECASE)
_WHOLE_RANGE = 1e8
"""ComfyUI's sigma of percent 0 lies above it: no limit."""
_DEPTH = 8


def timed_patches(model: Any) -> list[str]:
    """Names of the functions and objects on a ModelPatcher that act in a part of the sigmas only, "module: name".

    Told by what they hold, not by which nodes are known: a number between no noise and all of it, in a variable or an
    attribute that is called like a limit of sigma, as sigma_start.
    """
    found: dict[str, None] = {}
    for root in (model.model_options, getattr(model, "wrappers", {}), getattr(model, "callbacks", {})):
        for holder, held in _held(root, None, set(), _DEPTH):
            if any(_is_limit(name, value) for name, value in held.items()):
                found[_name(holder)] = None
    return list(found)


def _held(thing: Any, holder: Any, seen: set[int], depth: int) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Every function and object below `thing`, or the one that a mapping belongs to, with what it holds by name."""
    if id(thing) in seen or depth == 0 or isinstance(thing, (torch.Tensor, torch.nn.Module, types.ModuleType, type)):
        return
    seen.add(id(thing))
    if isinstance(thing, Mapping):
        named = {str(name): value for name, value in thing.items()}
        if holder is not None:
            yield holder, named
    elif isinstance(thing, (list, tuple, set)):
        named = {str(index): value for index, value in enumerate(thing)}
    else:
        holder, named = thing, _variables(thing)
        yield holder, named
    for value in named.values():
        if not isinstance(value, (str, bytes, Real, type(None))):
            yield from _held(value, holder, seen, depth - 1)


def _variables(thing: Any) -> dict[str, Any]:
    """What a function closes over, a partial call is given or an object's attributes, by name."""
    if isinstance(thing, types.MethodType):
        return {"self": thing.__self__, "function": thing.__func__}
    if isinstance(thing, functools.partial):
        return {"function": thing.func, **thing.keywords, **{str(i): value for i, value in enumerate(thing.args)}}
    if isinstance(thing, types.FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    if hasattr(thing, "model_options") and hasattr(thing, "get_model_object"):
        return {}  # another ModelPatcher
    return dict(getattr(thing, "__dict__", {}))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (raises where the variable has no value yet)
    except ValueError:
        return False
    return True


def _is_limit(name: str, value: Any) -> bool:
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and _LIMIT.search(name) is not None
        and 0.0 < float(value) < _WHOLE_RANGE
    )


def _name(holder: Any) -> str:
    """ "module: Class.method", the module without the folders in front."""
    named = holder if hasattr(holder, "__qualname__") else type(holder)
    module = re.split(r"[\\/]", named.__module__)[-1]
    return f"{module}: {named.__qualname__.replace('.<locals>', '')}"
