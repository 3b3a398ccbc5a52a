"""Cheap digests of weights, and of what else changes what they compute."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 16
_DEEPEST = 8
_OPAQUE = ("ModelPatcher", "UUID")
"""Classes, by a part of their name, that hold what changes from one run to the next."""


def digest(*groups: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and up to 16 evenly spaced values of every tensor, in float32.

    Two sets of weights that differ almost everywhere, as any training makes them, differ here; the cost is a few
    values a tensor.
    """
    sha = hashlib.sha256()
    for group in groups:
        for name in sorted(group):
            sha.update(f"{name}{tuple(group[name].shape)}".encode())
            sha.update(_sampled(group[name]))
    return sha.hexdigest()


def said(value: Any) -> str:
    """A text that is the same for equal values in every process: numbers, tensors, functions, objects of any class.

    A function is told by its qualified name, its defaults and what it closes over; an object by its class and the
    plain values, tensors and objects in its attributes. What cannot be told apart: two functions of one name whose
    code differs (another version of a pack), and whatever an object keeps outside its attributes (in C, in globals).
    """
    return json.dumps(_plain(value, frozenset(), 0), sort_keys=True)


def _plain(value: Any, above: Set[int], depth: int) -> Any:
    """JSON values; `above` are the ids of what this is a part of, which is not entered again."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return digest({"": value})
    if id(value) in above or depth > _DEEPEST or any(part in type(value).__name__ for part in _OPAQUE):
        return _name(type(value))
    inner = functools.partial(_plain, above=above | {id(value)}, depth=depth + 1)
    if isinstance(value, Mapping):
        return {str(key): inner(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(each) for each in value]
    if isinstance(value, nn.Module):
        return [_name(type(value)), digest(value.state_dict())]
    if callable(value) and (isinstance(value, (functools.partial, type)) or hasattr(value, "__qualname__")):
        return [_name(value), *(inner(each) for each in _bound(value))]
    return [_name(type(value)), {name: inner(each) for name, each in _attributes(value)}]


def _bound(function: Any) -> Iterator[Any]:
    """What a function is called with beside its arguments."""
    if isinstance(function, functools.partial):
        yield from (function.func, function.args, function.keywords)
    if isinstance(function, type):
        return
    yield from (each for each in (getattr(function, "__self__", None), getattr(function, "__defaults__", None)) if each)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """Attributes that say what an object does: networks, callbacks and what is not set yet come and go as it runs."""
    for name, value in sorted(getattr(thing, "__dict__", {}).items()):
        if value is not None and not isinstance(value, nn.Module) and not callable(value):
            yield name, value


def _name(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        return "partial"
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > _SAMPLES:
        flat = flat[torch.arange(_SAMPLES, device=flat.device) * (flat.numel() - 1) // (_SAMPLES - 1)]
    return flat.float().cpu().numpy().tobytes()
