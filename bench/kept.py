"""Tensors that are made once and kept in a file, for whoever comes again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..files import written_whole

log = logging.getLogger(__name__)


def kept(path: Path, key: str, made: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the file has, if it belongs to the key; made and written otherwise.

    Args:
        path: of the safetensors file.
        key: what the tensors follow from.
        made: makes them.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if path.is_file():
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                log.info("%s: used again", path)
                return {name: file.get_tensor(name) for name in list(file.keys())}
    tensors = made()
    with written_whole(path) as temporary:
        save_file(tensors, str(temporary), metadata={"key": key})
    return tensors
