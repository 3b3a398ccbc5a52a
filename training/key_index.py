"""Which of many keys is where, in 12 bytes a key."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable

import torch

_RECENT = 1 << 15


class KeyIndex:
    """Numbers by key, told apart by 64 bits of their SHA-256: sorted arrays, and a dictionary of the latest.

    Of two million keys, two have the same 64 bits in one case of ten million.
    """

    def __init__(self) -> None:
        self._hashes, self._numbers = array("q"), array("i")
        self._recent: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._hashes) + len(self._recent)

    def __contains__(self, key: str) -> bool:
        return self._find(_hash(key)) is not None

    def __getitem__(self, key: str) -> int:
        found = self._find(_hash(key))
        if found is None:
            raise KeyError(key)
        return found

    def update(self, keys: Iterable[str], number: int) -> None:
        """Sets the number of several keys."""
        for key in keys:
            self._recent[_hash(key)] = number
        if len(self._recent) >= _RECENT:
            self._merge()

    def _find(self, wanted: int) -> int | None:
        if wanted in self._recent:
            return self._recent[wanted]
        place = bisect_left(self._hashes, wanted)
        if place < len(self._hashes) and self._hashes[place] == wanted:
            return self._numbers[place]
        return None

    def _merge(self) -> None:
        """The latest go into the arrays; what they replace lies behind them and is left out."""
        hashes = torch.tensor([*self._recent], dtype=torch.int64)
        numbers = torch.tensor([*self._recent.values()], dtype=torch.int32)
        if self._hashes:
            hashes = torch.cat([hashes, torch.frombuffer(self._hashes, dtype=torch.int64)])
            numbers = torch.cat([numbers, torch.frombuffer(self._numbers, dtype=torch.int32)])
        order = hashes.argsort(stable=True)
        hashes, numbers = hashes[order], numbers[order]
        first = torch.ones(len(hashes), dtype=torch.bool)
        first[1:] = hashes[1:] != hashes[:-1]
        self._hashes = array("q", hashes[first].numpy().tobytes())
        self._numbers = array("i", numbers[first].numpy().tobytes())
        self._recent = {}


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
