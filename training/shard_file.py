"""A safetensors file that is read again and again, a tensor or a row of one at a time."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FLOATING = ("F64", "F32", "F16", "BF16")
_OF_NUMPY = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")


class ShardFile:
    """A file that stays open until it is closed, by `with` or when nobody knows it any more.

    Reads by numpy what numpy knows: whenever safetensors 0.8 makes a torch tensor, some 50 bytes are never given back,
    which the millions of reads of a training add up.

    Args:
        path: of the file.

    Raises:
        Exception: safetensors' own, where it is cut short; OSError, where there is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numpy = self._opened("np")

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file: some systems remove none that is open."""
        for opened in (self._numpy, self.__dict__.get("_torch")):
            if opened is not None:
                opened.__exit__(*error)

    @property
    def metadata(self) -> dict[str, str]:
        """Texts that the file carries beside its tensors."""
        return self._numpy.metadata() or {}

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._numpy.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        return tuple(self._numpy.get_slice(key).get_shape())

    def is_floating(self, key: str) -> bool:
        """Whether a tensor has floating point numbers; it is not read."""
        return self._numpy.get_slice(key).get_dtype() in _FLOATING

    def tensor(self, key: str) -> Tensor:
        """A tensor as a copy of its own."""
        if not self._is_of_numpy(key):
            return self._torch.get_tensor(key)
        return torch.from_numpy(self._numpy.get_tensor(key))

    def row(self, key: str, index: int) -> Tensor:
        """One row (first dimension) of a tensor, the rest of which is not read."""
        if not self._is_of_numpy(key):
            return self._torch.get_slice(key)[index]
        return torch.from_numpy(self._numpy.get_slice(key)[index])

    def _is_of_numpy(self, key: str) -> bool:
        return self._numpy.get_slice(key).get_dtype() in _OF_NUMPY

    @cached_property
    def _torch(self) -> Any:
        return self._opened("pt")

    def _opened(self, framework: str) -> Any:
        from safetensors import safe_open

        return safe_open(self._path, framework=framework)
