"""Captions and prompts: what of their letters is a mark to the text encoder. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING = "embedding:"
"""Begins the name of a textual inversion in a prompt."""

_BARE = re.compile(r"(?<!\\)[()]")
_ESCAPED = re.compile(r"\\([()])")
_NAMED = re.compile(re.escape(EMBEDDING) + r"(\S+)")
_AROUND = re.compile(r"[<\[{}|()].*")
_WEIGHT = re.compile(r":[-+.\d]*$")


def literal(caption: str) -> str:
    """The prompt that is read as the caption's letters: brackets that would weigh words get a backslash, as those of
    tags have that are written for prompts already."""
    return _BARE.sub(r"\\\g<0>", caption)


def named_inversions(prompts: Iterable[str]) -> list[str]:
    """Names that could be meant by "embedding:name" in prompts or templates of them, sorted: where one ends depends on
    which files there are."""
    found = set()
    for prompt in prompts:
        if EMBEDDING in prompt:
            for name in _NAMED.findall(_ESCAPED.sub(r"\1", prompt)):
                found |= _readings(name)
    return sorted(found)


def _readings(name: str) -> set[str]:
    bare = _AROUND.sub("", name)
    cut = {name, bare, _WEIGHT.sub("", bare)}
    return {reading for each in cut for reading in (each, each.strip(","), each.split(",")[0]) if reading}
