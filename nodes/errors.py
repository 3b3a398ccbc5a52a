"""Every error of a node names the node."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from ..hosts import HostError
from ..hosts.checks import is_absent, require_given
from ..samplers import NonFiniteStateError
from .effects import without_effect
from .running import note, running, with_notes
from .sockets import require_kinds

Function = TypeVar("Function", bound=Callable[..., Any])


def names_node(display_name: str) -> Callable[[Function], Function]:
    """Decorator for a node's FUNCTION: what the user can mend is raised again with the node's name in front.

    Before it begins, inputs that the node needs and whose checkpoint does not have them are refused, and so are values
    of another type than it declares and numbers that are not finite. Values without effect are named.

    Raises (from the decorated function):
        HostError: for every ValueError and NonFiniteStateError from below, which stays its cause.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @wraps(function)
        def run(*args: Any, **inputs: Any) -> Any:
            try:
                every = signature.bind_partial(*args, **inputs).arguments
                with running(display_name, type(args[0]).__name__, every) as notes:
                    _look_at(args[0], inputs, every)
                    return with_notes(args[0], function(*args, **inputs), notes)
            except (ValueError, NonFiniteStateError) as error:
                message = str(error)
                named = message if message.startswith(display_name) else f"{display_name}: {message}"
                raise HostError(named) from error

        return run  # type: ignore[return-value]

    return decorate


def _look_at(node: Any, inputs: Mapping[str, Any], every: Mapping[str, Any]) -> None:
    """Refuses inputs that the node cannot take, and names those that it does nothing with.

    Args:
        inputs: by name, as hosts give them.
        every: with those that a caller in Python gave by their place.
    """
    declared = node.INPUT_TYPES()
    if any(is_absent(value) for value in inputs.values()):
        require_given(inputs, declared.get("required", {}))
    everything = {**declared.get("required", {}), **declared.get("optional", {})}
    require_kinds(everything, inputs)
    for text in without_effect(type(node).__name__, everything, every):
        note(text)
