"""JSON objects that the pack wrote and reads again: of a known version, with the keys and kinds that are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

VERSION = "version"


def parsed(text: str, version: int, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object, checked.

    Args:
        text: to parse.
        version: the newest that is known; an object without one is of the first.
        kinds: type of each key, for isinstance; one that holds None may be missing.

    Raises:
        ValueError: what is wrong with it, in a clause.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is a JSON {type(found).__name__}, not an object")
    _require_known(found.get(VERSION, 1), version)
    for key, kind in kinds.items():
        value = found.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"its {key!r} is " + ("missing" if value is None else f"a {type(value).__name__}"))
    return found


def _require_known(found: Any, known: int) -> None:
    number = found if isinstance(found, int) else found.isdecimal() and int(found) if isinstance(found, str) else 0
    if number > known:
        raise ValueError(f"it was made by a newer version of Diff2Flow (its version is {found}, {known} is known here)")
    if number < 1:
        raise ValueError(f"its version is {found!r}, not a number from 1 to {known}")
