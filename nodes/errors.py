"""Every error of a node names the node."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from ..hosts import HostError
from ..hosts.checks import is_absent, require_given
from ..samplers import NonFiniteStateError

Function = TypeVar("Function", bound=Callable[..., Any])


def names_node(display_name: str) -> Callable[[Function], Function]:
    """Decorator for a node's FUNCTION: what the user can mend is raised again with the node's name in front.

    Inputs that the node needs and whose checkpoint does not have them are refused before it begins.

    Raises (from the decorated function):
        HostError: for every ValueError and NonFiniteStateError from below, which stays its cause.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def run(*args: Any, **inputs: Any) -> Any:
            try:
                if any(is_absent(value) for value in inputs.values()):
                    require_given(inputs, args[0].INPUT_TYPES().get("required", {}))
                return function(*args, **inputs)
            except (ValueError, NonFiniteStateError) as error:
                message = str(error)
                named = message if message.startswith(display_name) else f"{display_name}: {message}"
                raise HostError(named) from error

        return run  # type: ignore[return-value]

    return decorate
