"""Prompts as ComfyUI reads them: weights in parentheses, chunks of 77 tokens. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..port import HostError
from .tokens import END, START

CHUNK = 77

_NESTED = 1.1
_DEEPEST = 100
_LONG = 8
"""From this many tokens on, a piece of the prompt may be cut between two chunks; shorter ones move on whole."""
_ESCAPED = {"\\)": "\0\1", "\\(": "\0\2"}
_EMBEDDING = re.compile(r"(?:^|[ \n])embedding:(\S*)")


@dataclass(frozen=True)
class Chunk:
    """77 token ids and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def weighted_pieces(prompt: str) -> list[tuple[str, float]]:
    """The prompt's pieces and their weights.

    "(word)" weighs 1.1 times what is around it, "(word:1.3)" weighs 1.3; parentheses nest; "\\(" and "\\)" are text.

    Raises:
        HostError: parentheses nest more than 100 times.
    """
    for escape, stand_in in _ESCAPED.items():
        prompt = prompt.replace(escape, stand_in)
    return [(_restored(text), weight) for text, weight in _pieces(prompt, 1.0, 0)]


def chunks(prompt: str, tokenize: Callable[[str], list[int]], pad: int) -> list[Chunk]:
    """The prompt in chunks of 77 tokens, each with start, end and padding.

    Args:
        tokenize: token ids of a text without marks.
        pad: id that fills a chunk up.

    Raises:
        HostError: the prompt names a textual inversion ("embedding:...").
    """
    filled: list[list[tuple[int, float]]] = [[]]
    refuse_embeddings(prompt)
    for text, weight in weighted_pieces(prompt):
        if text:
            _pack(filled, [(token, weight) for token in tokenize(text)])
    return [_chunk(tokens, pad) for tokens in filled]


def refuse_embeddings(prompt: str) -> None:
    """Raises HostError if the prompt names a textual inversion, as ComfyUI would read it."""
    for text, _ in weighted_pieces(prompt):
        found = _EMBEDDING.search(text)
        if found:
            raise HostError(
                f"the prompt names the textual inversion 'embedding:{found[1]}', which headless cannot load yet; take"
                " it out of the prompt, or run the workflow in ComfyUI"
            )


def empty_chunk(pad: int) -> Chunk:
    """The chunk of an empty prompt."""
    return _chunk([], pad)


def _pieces(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    if depth > _DEEPEST:
        raise HostError(
            f"the prompt nests parentheses more than {_DEEPEST} times; write \\( and \\) for the characters themselves"
        )
    for part in _outer_parts(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            yield part, weight
            continue
        inside, given = _explicit_weight(part[1:-1])
        yield from _pieces(inside, weight * _NESTED if given is None else given, depth + 1)


def _outer_parts(text: str) -> Iterator[str]:
    """Cuts a text before each outermost "(" and after its ")"."""
    start, depth = 0, 0
    for i, character in enumerate(text):
        if character == "(":
            if depth == 0 and start < i:
                yield text[start:i]
                start = i
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[start : i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]


def _explicit_weight(inside: str) -> tuple[str, float | None]:
    text, colon, number = inside.rpartition(":")
    if colon and text:
        try:
            return text, float(number)
        except ValueError:
            pass
    return inside, None


def _restored(text: str) -> str:
    for escape, stand_in in _ESCAPED.items():
        text = text.replace(stand_in, escape[1])
    return text


def _pack(filled: list[list[tuple[int, float]]], tokens: list[tuple[int, float]]) -> None:
    """Adds a piece's tokens to the last chunk, and to new ones once it is full."""
    may_cut, place = len(tokens) >= _LONG, 0
    while place < len(tokens):
        room = CHUNK - 2 - len(filled[-1])
        left = len(tokens) - place
        if left <= room or may_cut:
            filled[-1] += tokens[place : place + room]
            place += min(room, left)
        if left > room:
            filled.append([])


def _chunk(tokens: list[tuple[int, float]], pad: int) -> Chunk:
    whole = [(START, 1.0), *tokens, (END, 1.0)]
    whole += [(pad, 1.0)] * (CHUNK - len(whole))
    ids, weights = zip(*whole, strict=True)
    return Chunk(ids, weights)
