"""What identifies cached and continued work: a digest that can say in words what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

WEIGHTS = "weights"
_NONE = "not set"

Facts = Mapping[str, Mapping[str, str]]
"""Of each thing that work depends on ("model", "text encoder", "images"), its `facts_of`."""


class Identity(str):
    """Tells two CLIPs, VAEs or MODELs apart; as a string it is the key that work is kept under.

    Where nothing is set, that is the digest of the weights alone.

    Args:
        weights: digest of the weights and of the patches on them.
        settings: what else changes what it computes, by its name in words, as far as it is not what it is by itself.
        usual: what those settings are by themselves, where that can be said.
    """

    weights: str
    settings: dict[str, str]
    usual: dict[str, str]

    def __new__(
        cls, weights: str, settings: Mapping[str, str] | None = None, usual: Mapping[str, str] | None = None
    ) -> Identity:
        """The digest, with what it is made of as attributes."""
        chosen = dict(sorted((settings or {}).items()))
        key = digest_of([weights, chosen]) if chosen else weights
        made = super().__new__(cls, key)
        made.weights, made.settings, made.usual = weights, chosen, dict(usual or {})
        return made


def digest_of(value: Any) -> str:
    """Hex SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def facts_of(identity: str) -> dict[str, str]:
    """An identity in words, as it is kept beside the work; a plain digest has nothing to say but itself."""
    if not isinstance(identity, Identity):
        return {WEIGHTS: str(identity)}
    return {WEIGHTS: identity.weights, **identity.usual, **identity.settings}


def settings_that_differ(one: str, other: str) -> list[tuple[str, str, str]]:
    """Names in words of the settings that differ between two identities, with the values of both."""
    mine, others = facts_of(one), facts_of(other)
    names = sorted((mine.keys() | others.keys()) - {WEIGHTS})
    pairs = [(name, mine.get(name, _NONE), others.get(name, _NONE)) for name in names]
    return [(name, a, b) for name, a, b in pairs if a != b]


def all_differences(
    there: Mapping[str, Any], here: Mapping[str, Any], facts_there: Mapping[str, Facts], facts_here: Mapping[str, Facts]
) -> list[str]:
    """ "learning_rate: 0.0001 there, 0.001 here" for every setting that differs; of digests what they are made of.

    Args:
        there, here: identities of the work that was found, and of that which is wanted.
        facts_there, facts_here: what digests in them are made of, by their names there; that of work that was made
            before it was noted is empty.
    """
    found = []
    for name in sorted(there.keys() | here.keys()):
        if name in facts_here:
            known = facts_there.get(name, {})
            found += things_differ(name, known, facts_here[name]) if there.get(name) != here.get(name) else []
        else:
            found += _leaves_differ(name, there.get(name), json.loads(json.dumps(here.get(name))))
    return found


def _leaves_differ(name: str, there: Any, here: Any) -> list[str]:
    if isinstance(there, dict) or isinstance(here, dict):
        there, here = there or {}, here or {}
        keys = sorted(there.keys() | here.keys())
        return [line for key in keys for line in _leaves_differ(key, there.get(key), here.get(key))]
    return [] if there == here else [told(name, there, here)]


def things_differ(name: str, there: Facts, here: Facts) -> list[str]:
    """What differs in the things that a digest is made of, in words.

    Args:
        name: of the digest, where nothing better can be said.
        there: of the work that was found; empty where that was made before it was noted.
        here: of the work that is wanted.
    """
    things = [thing for thing in sorted(there.keys() | here.keys()) if there]
    found = [line for thing in things for line in differences(thing, there.get(thing, {}), here.get(thing, {}))]
    return found or [f"another {name}, or other settings of it"]


def differences(name: str, there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What differs in a thing, in words: "another model", "clip skip: -2 there, -1 here"."""
    found = [f"another {name}"] if there.get(WEIGHTS) != here.get(WEIGHTS) else []
    noted = len(there) > 1 or not found  # else it is of a time when settings were not
    names = sorted((there.keys() | here.keys()) - {WEIGHTS}) if noted else []
    return found + [told(each, there.get(each), here.get(each)) for each in names if there.get(each) != here.get(each)]


def told(name: str, there: Any, here: Any) -> str:
    """ "cfg: 2.0 there, 3.0 here"."""
    return f"{name}: {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = _NONE if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
