"""Checks one input's value against what its node declares. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .workflow import closest

Spec = tuple[Any, Mapping[str, Any]]
"""An input's declared type (a name, or a list of choices) and its options."""

_MANY = 8


def spec_of(declared: Any) -> Spec:
    """Type and options of a declaration in INPUT_TYPES: ("INT", {...}), ("MODEL",), ("COMBO", {"options": [...]})."""
    kind, options = declared[0], declared[1] if len(declared) > 1 else {}
    if kind == "COMBO" and "options" in options:
        return list(options["options"]), options
    return kind, options


def checked(spec: Spec, value: Any, limits: bool = True) -> Any:
    """The value in its declared type.

    Args:
        limits: whether min, max and choices are checked; off where the node checks the input itself.

    Raises:
        ValueError: another type, out of range, or not among the choices; the message names the way out.
    """
    kind, options = spec
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    if isinstance(kind, (list, tuple)):
        return _choice(kind, value) if limits else value
    if kind in _CONVERTERS:
        value = _CONVERTERS[kind](value)
        return _in_range(options, value) if limits and kind in ("INT", "FLOAT") else value
    if kind == "*" or "," in str(kind):
        return value
    raise ValueError(
        f"is {value!r}, but a {kind} can only come from another node: write a link [node id, output index]"
    )


def _integer(value: Any) -> int:
    try:
        number = float(value) if isinstance(value, str) and not value.strip().lstrip("+-").isdigit() else value
        if isinstance(number, float) and not number.is_integer():
            raise ValueError
        return int(number)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"is {value!r}, but must be a whole number") from None


def _real(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"is {value!r}, but must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"is {value!r}, but must be a finite number")
    return number


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)) or value is None:
        raise ValueError(f"is {value!r}, but must be text")
    return str(value)


def _switch(value: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    try:
        return known[str(value).lower()]
    except KeyError:
        raise ValueError(f"is {value!r}, but must be true or false") from None


_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {"INT": _integer, "FLOAT": _real, "STRING": _text, "BOOLEAN": _switch}


def _in_range(options: Mapping[str, Any], value: Any) -> Any:
    low, high = options.get("min", -math.inf), options.get("max", math.inf)
    if value < low:
        raise ValueError(f"is {value}, below the smallest allowed, {low}")
    if value > high:
        raise ValueError(f"is {value}, above the largest allowed, {high}")
    return value


def _choice(choices: Any, value: Any) -> Any:
    if value in choices:
        return value
    if not choices:
        raise ValueError(f"is {value!r}, but there is nothing to choose from")
    near = closest(str(value), choices)
    if len(choices) <= _MANY:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(
            f"is {value!r}, but must be one of {listed}" + (f"; closest: {near}" if near != listed else "")
        )
    raise ValueError(f"is {value!r}, which is not among the {len(choices)} choices; closest: {near}")
