"""What is said of a picture: its style and name, in several wordings, with keywords that other pictures share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .data import Picture

_NAMED, _DESCRIBED, _KEYWORDS = 0.62, 0.18, 0.10
"""Shares of "fluent style, red heart", of "fluent style, red heart, love" and of "fluent style, love, emotion"; the
rest is "red heart", in any style."""
_MOST_KEYWORDS = 3
MOST_TOKENS = 22
"""Of a caption; keywords that would make it longer are left out."""
_SHARED = 2
"""Pictures of as many objects must have a keyword for it to be said."""


def usual(style: str, name: str) -> str:
    """The plainest caption."""
    return f"{style} style, {name}"


class Captions:
    """Wordings of pictures.

    Args:
        about: the pictures.
    """

    def __init__(self, about: Sequence[Picture]) -> None:
        self._about = about
        objects = {picture.hexcode: picture.keywords for picture in about}
        counts = Counter(word for words in objects.values() for word in words)
        self._keywords = [tuple(word for word in p.keywords if counts[word] >= _SHARED) for p in about]

    def drawn(self, place: int, random: torch.Generator) -> str:
        """A caption of the picture at a place."""
        picture, keywords = self._about[place], self._keywords[place]
        kind = float(torch.rand((), generator=random))
        if kind < _NAMED or (not keywords and kind < _NAMED + _DESCRIBED + _KEYWORDS):
            return usual(picture.style, picture.name)
        if kind >= _NAMED + _DESCRIBED + _KEYWORDS:
            return picture.name
        order = torch.randperm(len(keywords), generator=random).tolist()
        chosen = [keywords[i] for i in order[: 1 + int(torch.randint(_MOST_KEYWORDS, (), generator=random))]]
        first = [picture.name] if kind < _NAMED + _DESCRIBED else [chosen.pop()]
        caption = usual(picture.style, ", ".join([*first, *chosen]))
        while len(token_ids(caption)) > MOST_TOKENS and chosen:
            chosen.pop()
            caption = usual(picture.style, ", ".join([*first, *chosen]))
        return caption

    def tokens(self) -> list[int]:
        """All token ids that a caption may have, sorted."""
        phrases = {usual(picture.style, picture.name) for picture in self._about}
        phrases |= {f"style, {word}, {word}" for words in self._keywords for word in words}
        return sorted({token for phrase in phrases for token in token_ids(phrase)})


@lru_cache(maxsize=100_000)
def token_ids(text: str) -> tuple[int, ...]:
    """CLIP's token ids of a text, without start and end marks."""
    from ...hosts.headless.tokens import tokenize

    return tuple(tokenize(text))


def padded(texts: Sequence[str], length: int) -> Tensor:
    """Token ids (B, length) with start mark, end mark and end marks as padding.

    Raises:
        ValueError: a text is too long.
    """
    from ...hosts.headless.tokens import END, START

    rows = [[START, *token_ids(text)] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) >= length:
            raise ValueError(f"{text!r} has {len(row) - 1} tokens, at most {length - 2} are read")
    return torch.tensor([row + [END] * (length - len(row)) for row in rows])
