"""An accelerator that is only pretended: its tensors lie in the CPU's memory, and their storages are marked.

What differs on a real one is kept: tensors of unlike devices do not mix, a device may lack float64, and the host waits
where it reads the device or copies without `non_blocking` from or to memory that is not pinned. The waits are counted
by place.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = ("/torch/", "/tests/", "/contextlib.py", "<")
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
"""Operations whose result the host needs before it can go on."""
_MOVING = {"copy_", "_to_copy", "set_", "_foreach_copy_"}
_NO_SCALARS = {"cat", "stack", "searchsorted", "gather"}
"""Operations that refuse even a single number of the CPU beside tensors of the device."""
_FROM_NUMBERS = {"tensor", "as_tensor", "asarray"}
_GROUPED = torch._C._group_tensors_by_device_and_dtype


class PretendedDevice:
    """The device while the context lasts.

    Args:
        kind: its type, such as "cuda" or "mps".
        float64: whether it has float64.

    Attributes:
        device: to hand to what is tested.
        waits: how often the host waited, by "what at file:line"; counted inside `counted` alone.
    """

    def __init__(self, kind: str = "cuda", float64: bool = True) -> None:
        self.device, self.float64 = torch.device(kind, 0), float64
        self.waits: Counter[str] = Counter()
        self.counting = False
        self._entered = ExitStack()

    def __enter__(self) -> PretendedDevice:
        # Torch's own scaler is off without CUDA, and there is nothing that an event could wait for.
        self._entered.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        self._entered.enter_context(mock.patch("torch.cuda.Event", mock.MagicMock))
        self._entered.enter_context(mock.patch("torch._C._group_tensors_by_device_and_dtype", self._grouped))
        self._entered.enter_context(_Functions(self))
        self._entered.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def place(self, module: nn.Module) -> None:
        """The module's weights and buffers are on the device from now on."""
        for tensor in (*module.parameters(), *module.buffers()):
            mark(tensor)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Waits in this context are counted."""
        before, self.counting = self.counting, True
        try:
            yield self.waits
        finally:
            self.counting = before

    def wait(self, what: str) -> None:
        """The host waits for the device now."""
        if self.counting:
            self.waits[f"{what} at {_place()}"] += 1

    def require_dtype(self, *tensors: Tensor) -> None:
        """TypeError where the device is asked for a float64 that it has not."""
        if not self.float64 and any(tensor.dtype == torch.float64 for tensor in tensors):
            raise TypeError(f"{self.device.type} has no float64: it was asked for at {_place()}")

    def _grouped(self, lists: Any, with_indices: bool = False, by: Callable[..., Any] = _GROUPED) -> Any:
        """Torch's grouping of parameters by device and dtype, which looks at the memory itself."""
        groups = by(lists, with_indices)
        return {
            (self.device if is_marked(group[0][0][0]) else device, dtype): group
            for (device, dtype), group in groups.items()
        }

    def names(self, device: Any) -> bool:
        """Whether this is meant by what a function was given as its device."""
        return isinstance(device, (str, torch.device)) and torch.device(device).type == self.device.type

    def arrived(self, tensor: Tensor) -> Tensor:
        """A tensor that was made or brought there."""
        self.require_dtype(tensor)
        return mark(tensor)


def is_marked(tensor: Tensor) -> bool:
    """Whether a tensor is on the pretended device."""
    storage = _storage(tensor)
    return storage is not None and getattr(storage, "is_pretended", False)


def mark(tensor: Tensor) -> Tensor:
    """Puts a tensor, and all that shares its memory, on the pretended device."""
    storage = _storage(tensor)
    if storage is not None:
        storage.is_pretended = True
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor of the CPU is in pinned memory, as far as that is pretended."""
    return getattr(_storage(tensor), "is_pretended_pinned", False)


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and the like
        return None


class _Functions(TorchFunctionMode):
    """What Python asks of torch: where a tensor is, to move one, to make one there."""

    def __init__(self, pretended: PretendedDevice) -> None:
        super().__init__()
        self._device = pretended

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        own = args[0] if args and isinstance(args[0], Tensor) else None
        if own is not None:
            answer = getattr(self, f"_{name}", None)
            if answer is not None:
                return answer(func, own, *args[1:], **kwargs)
        if self._device.names(kwargs.get("device")):
            return self._made_there(func, name, args, kwargs)
        out = func(*args, **kwargs)
        if own is not None and is_marked(own) and name.endswith("_like") and "device" not in kwargs:
            self._device.arrived(out)
        return out

    def ___get__(self, func: Any, own: Tensor, *rest: Any) -> Any:
        asked = getattr(getattr(func, "__self__", None), "__name__", "")
        if is_marked(own) and asked in ("device", "is_cuda", "is_cpu"):
            return {"device": self._device.device, "is_cuda": self._device.names("cuda"), "is_cpu": False}[asked]
        return func(own, *rest)

    def _to(self, func: Any, own: Tensor, *given: Any, non_blocking: bool = False, **named: Any) -> Tensor:
        target = named.pop("device", None)
        for value in given:
            if isinstance(value, Tensor):
                target = self._device.device if is_marked(value) else torch.device("cpu")
                named["dtype"] = value.dtype
            elif isinstance(value, torch.dtype):
                named["dtype"] = value
            elif isinstance(value, (str, torch.device)):
                target = value
        if target is None or self._device.names(target) == is_marked(own):
            return func(own, **named) if named else own
        return self._moved(own, target, non_blocking, **named)

    def _cpu(self, func: Any, own: Tensor) -> Tensor:
        return self._moved(own, "cpu", False) if is_marked(own) else own

    def _pin_memory(self, func: Any, own: Tensor, *rest: Any) -> Tensor:
        if is_marked(own):
            raise RuntimeError("only memory of the CPU can be pinned")
        if any(step == 0 and size > 1 for step, size in zip(own.stride(), own.shape, strict=True)):
            raise RuntimeError("more than one element of the written-to tensor refers to a single memory location")
        pinned = own.clone()
        if isinstance(pinned, FakeTensor):
            raise AssertionError("NYI: aten._pin_memory.default")
        pinned.untyped_storage().is_pretended_pinned = True
        return pinned

    def _is_pinned(self, func: Any, own: Tensor, *rest: Any) -> bool:
        return is_pinned(own)

    def _numpy(self, func: Any, own: Tensor, *rest: Any, **named: Any) -> Any:
        if is_marked(own):
            raise TypeError(f"can't convert {self._device.device} device type tensor to numpy; use Tensor.cpu()")
        return func(own, *rest, **named)

    def _tolist(self, func: Any, own: Tensor) -> Any:
        if is_marked(own):
            self._device.wait("tolist")
        return func(own)

    def _moved(self, own: Tensor, target: Any, non_blocking: bool, **named: Any) -> Tensor:
        """A copy on the other side. To pinned memory, as torch takes it for `non_blocking` to the CPU, nobody waits."""
        there = self._device.names(target)
        if not non_blocking or (there and not is_pinned(own)):
            self._device.wait("to the device" if there else "to the CPU")
        if not there:  # the dtype changes on the device, before the copy
            self._device.require_dtype(own, torch.empty(0, dtype=named.get("dtype", own.dtype)))
        return _Crossing.apply(own, {"dtype": own.dtype, **named, "copy": True}, self._device if there else None)

    def _made_there(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A new tensor on the device; numbers of Python are copied there, which waits."""
        if name in _FROM_NUMBERS:
            self._device.wait(name)
        elif name == "Generator":
            raise NotImplementedError(name)
        return self._device.arrived(func(*args, **{**kwargs, "device": "cpu"}))


class _Crossing(torch.autograd.Function):
    """A copy on the other side, whose gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, how: dict[str, Any], device: PretendedDevice | None) -> Tensor:
        ctx.dtype, ctx.was_there = own.dtype, is_marked(own)
        with _unseen():
            moved = own.to(**how)
        return moved if device is None else device.arrived(moved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with _unseen():
            back = gradient.to(ctx.dtype, copy=True)
        return mark(back) if ctx.was_there else back, None, None


class _Operations(TorchDispatchMode):
    """What torch computes: on one device alone, results where the inputs are; reads wait."""

    def __init__(self, pretended: PretendedDevice) -> None:
        super().__init__()
        self._device = pretended

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if is_marked(tensor)]
        if not there or _hidden:
            return func(*args, **kwargs)
        self._require_one_device(name, tensors, args)
        if name in _READS or (name.startswith("index") and _has_mask(args)):
            self._device.wait(name)
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            mark(tensor)
        self._device.require_dtype(*made)
        return out

    def _require_one_device(self, name: str, tensors: list[Tensor], args: tuple[Any, ...]) -> None:
        """RuntimeError where devices mix; single numbers of the CPU and, with a wait, its indices may."""
        here = [tensor for tensor in tensors if not is_marked(tensor)]
        strangers = [tensor for tensor in here if tensor.ndim or name in _NO_SCALARS]
        if not strangers:
            return
        if name in _MOVING or (name.startswith("index") and is_marked(args[0])):
            if not all(map(is_pinned, strangers)):
                self._device.wait(name)
            return
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {self._device.device} and cpu in {name} at"
            f" {_place()}"
        )


_hidden: list[bool] = []


@contextmanager
def _unseen() -> Iterator[None]:
    """The pretended device's own copies are no operations on it."""
    _hidden.append(True)
    try:
        yield
    finally:
        _hidden.pop()


def _has_mask(args: tuple[Any, ...]) -> bool:
    """Whether a tensor is indexed by a mask, of which the host must know how many places it has."""
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1:2]))


def _place() -> str:
    """The innermost line of the product, else of a library beside torch."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(part in file for part in _OUTSIDE):
            path = Path(file).resolve()
            inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
            return f"{inside.as_posix()}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
