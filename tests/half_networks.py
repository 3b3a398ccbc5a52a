"""Half-precision networks on the CPU, as a card has them: for tests that run without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def norms_as_on_cuda() -> Iterator[None]:
    """Under autocast, norms are computed in float32, as CUDA does and the CPU does not."""
    functional = torch.nn.functional
    real = functional.group_norm, functional.layer_norm

    def in_float32(norm: Any) -> Any:
        def computed(x: Any, what: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
            if not torch.is_autocast_enabled("cpu"):
                return norm(x, what, weight, bias, eps)
            with torch.autocast("cpu", enabled=False):
                return norm(x.float(), what, *(None if each is None else each.float() for each in (weight, bias)), eps)

        return computed

    functional.group_norm, functional.layer_norm = map(in_float32, real)
    try:
        yield
    finally:
        functional.group_norm, functional.layer_norm = real


class Products(TorchDispatchMode):
    """Notes the number formats that matrix products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name.startswith(("mm.", "addmm", "convolution", "bmm", "baddbmm", "_scaled_dot")):
            self.formats.add(str(args[1].dtype))
        return function(*args, **(kwargs or {}))
