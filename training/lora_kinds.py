"""What the kinds of LoRA files do to a weight, as ComfyUI's loader reads them.

LoRA: Hu et al., arXiv 2106.09685; DoRA: 2402.09353; LoHa (FedPara): 2108.06098; LoKr and the decompositions with a
middle tensor: LyCORIS, 2309.14859; GLoRA: 2306.07967; OFT: 2306.07280; BOFT: 2311.06243.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]

_NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "LoRA": (("lora_up.weight",), ("lora_down.weight",)),
    "LoHa": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "LoKr": (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
    "GLoRA": (("a1.weight",), ("a2.weight",), ("b1.weight",), ("b2.weight",)),
    "OFT": (("oft_blocks",),),
    "norm": (("w_norm",),),
    "diff": (("diff",),),
    "set": (("set_weight",),),
}
"""Kinds of a weight's change -> its tensors; of those in one bracket, one must be there."""
_MARKS: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("lora_mid.weight",),
    "LoHa": ("hada_t1", "hada_t2"),
    "LoKr": ("lokr_t2",),
    "norm": ("b_norm",),
    "OFT": ("rescale",),
}
"""Tensors of a kind that need not be there."""
_DECOMPOSED = ("LoRA", "LoHa", "LoKr", "GLoRA")
"""Kinds that may have a dora_scale."""
_WHOLE = {"norm": "w_norm", "diff": "diff", "set": "set_weight"}
"""Kinds that are one tensor of the weight's shape."""
_BLOCKS_OF_BOFT = 4
"""Dimensions of oft_blocks; OFT's have 3."""


@dataclass(frozen=True, eq=False)
class Change:
    """What a LoRA file does to one weight.

    Args:
        kind: "LoRA", "LoHa", "LoKr", "GLoRA", "OFT", "BOFT", "norm", "diff" or "set".
        parts: the layer's tensors, by their names in `lora_keys`.
    """

    kind: str
    parts: Parts

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape that the weight is padded to with zeros first; None where it keeps its own."""
        widened = self.parts.get("reshape_weight")
        return None if widened is None or self.kind != "LoRA" else tuple(int(size) for size in widened)

    @property
    def alpha(self) -> float | None:
        """As the file has it: over the rank it is the change's factor, in OFT and BOFT the largest norm."""
        return float(self.parts["alpha"]) if "alpha" in self.parts else None

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """The changed weight, in the weight's dtype and its own memory.

        weight + strength · scale · delta; with a dora_scale weight + strength · (decomposed - weight). OFT turns by
        strength² · (R - 1), as in ComfyUI, and a "set" weight does not know strength.

        Args:
            weight: (out, ...), floating point.
            strength: factor, any sign.

        Raises:
            ValueError: the tensors make no change of this weight's shape.
        """
        weight = padded(weight, self.shape)
        parts = {name: part.to(weight) for name, part in self.parts.items() if name != "alpha"}
        if self.kind == "set":
            return _shaped(parts["set_weight"], weight).clone()
        try:
            delta, rank = _FORMULAS[self.kind](parts, weight, strength, self.alpha)
        except (RuntimeError, IndexError) as error:  # matrices that cannot be multiplied
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
            raise ValueError(f"{shapes} where the model has {tuple(weight.shape)}") from error
        delta = _shaped(delta, weight)
        if rank is not None and self.alpha is not None:
            delta = delta * (self.alpha / rank)
        if "dora_scale" in parts:
            delta = _decomposed(parts["dora_scale"], weight, delta) - weight
        return weight + strength * delta

    def require_shape(self, shape: Sequence[int]) -> None:
        """Raises ValueError where the tensors make no change of a weight of that shape; LoRA, LoHa and LoKr by sizes.

        The other kinds are computed, in a moment: they are small, or rare.
        """
        if self.kind in _WHOLE:
            own = tuple(self.parts[_WHOLE[self.kind]].shape)
            if own != tuple(shape):
                raise ValueError(f"shape {own} where the model has {tuple(shape)}")
            return
        if self.kind not in _SIZES:
            self.apply(torch.zeros(tuple(shape)), 1.0)
            return
        target = _wider(shape, self.shape)
        sizes = {name: tuple(part.shape) for name, part in self.parts.items()}
        rows, columns = _SIZES[self.kind](sizes)
        if (rows, rows * columns) != (target[0], math.prod(target)):
            raise ValueError(f"a change of {rows} outputs and {columns} inputs where the model has {target}")
        if "dora_scale" in sizes:
            _is_of_outputs(sizes["dora_scale"], target)


def changes(parts: Parts) -> dict[str, Change]:
    """What the tensors of one layer change: its "weight", its "bias", both or neither.

    Raises:
        ValueError: tensors are missing, or are such as ComfyUI's loader reads wrongly.
    """
    kinds = [kind for kind, needed in _NEEDED.items() if any(name in parts for name in _names(kind, needed))]
    if len(kinds) > 1:
        raise ValueError(f"it is {' and '.join(kinds)} at once, of which only one would count")
    found = {}
    if kinds:
        _require_whole(kinds[0], parts)
        found["weight"] = Change("BOFT" if _is_boft(parts) else kinds[0], parts)
        _require_sound(found["weight"])
    bias = parts.get("diff_b", parts.get("b_norm"))
    return found if bias is None else {**found, "bias": Change("diff", {"diff": bias})}


def without_middle_of_lokr(parts: Parts) -> Parts:
    """The same layer without lokr_t2, which ComfyUI's loader cannot apply under every version of torch."""
    if "lokr_t2" not in parts:
        return parts
    exact = {name: part.float() for name, part in parts.items()}
    first = exact["lokr_w1"] if "lokr_w1" in exact else exact["lokr_w1_a"] @ exact["lokr_w1_b"]
    second = _product(exact["lokr_w2_a"], exact["lokr_w2_b"], exact["lokr_t2"])
    scale = float(parts["alpha"]) / parts["lokr_w2_b"].shape[0] if "alpha" in parts else 1.0
    kept = {name: part for name, part in parts.items() if name != "alpha" and not name.startswith("lokr_")}
    return {**kept, "lokr_w1": first, "lokr_w2": (scale * second).contiguous()}


def padded(weight: Tensor, shape: Sequence[int] | None) -> Tensor:
    """The weight with zeros after its end in every dimension where `shape` is larger; itself if there is no shape.

    Raises:
        ValueError: the shape is smaller than the weight's or has another number of dimensions.
    """
    if _wider(weight.shape, shape) == tuple(weight.shape):
        return weight
    wide = weight.new_zeros(tuple(shape or ()))
    wide[tuple(slice(0, size) for size in weight.shape)] = weight
    return wide


def _wider(old: Sequence[int], new: Sequence[int] | None) -> tuple[int, ...]:
    """The shape that a weight is padded to."""
    if new is None:
        return tuple(old)
    if len(new) != len(old) or any(wide < size for wide, size in zip(new, old, strict=True)):
        raise ValueError(f"a weight of shape {tuple(old)} cannot be widened to {tuple(new)}")
    return tuple(new)


def _names(kind: str, needed: tuple[tuple[str, ...], ...]) -> set[str]:
    return {name for names in needed for name in names} | set(_MARKS.get(kind, ()))


def _is_boft(parts: Parts) -> bool:
    return "oft_blocks" in parts and parts["oft_blocks"].ndim == _BLOCKS_OF_BOFT


def _require_whole(kind: str, parts: Parts) -> None:
    missing = [names[-1] for names in _NEEDED[kind] if not any(name in parts for name in names)]
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        missing.append("hada_t1" if "hada_t2" in parts else "hada_t2")
    if missing:
        raise ValueError(f"it lacks {' and '.join(missing)}: the file is incomplete")


def _require_sound(change: Change) -> None:
    """Raises for what ComfyUI's loader reads without its effect, or not at all."""
    if "dora_scale" in change.parts and change.kind not in _DECOMPOSED:
        raise ValueError(f"it is {change.kind} with a dora_scale, which ComfyUI's loader reads wrongly")
    if change.kind == "OFT" and "rescale" in change.parts:
        raise ValueError("it is OFT with a rescale, which ComfyUI's loader leaves out")
    if change.kind == "BOFT" and change.alpha is None:
        raise ValueError("it is BOFT without alpha, on which ComfyUI's loader fails")


def _shaped(delta: Tensor, weight: Tensor) -> Tensor:
    if delta.shape[:1] != weight.shape[:1] or delta.numel() != weight.numel():
        raise ValueError(f"shape {tuple(delta.shape)} where the model has {tuple(weight.shape)}")
    return delta.reshape(weight.shape)


def _decomposed(scale: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """scale · (W + D)/norm as ComfyUI has it: |W| for each output, or |W + D| for each input channel."""
    changed = weight + delta
    if _is_of_outputs(scale.shape, weight.shape):
        norm = weight.flatten(1).norm(dim=1).reshape(scale.shape)
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(scale.shape)
    return changed * (scale / (norm + torch.finfo(weight.dtype).eps))


def _is_of_outputs(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a dora_scale of that shape has one entry for each output of the weight, or one for each input.

    Raises:
        ValueError: it has neither.
    """
    outputs, inputs, *kernel = weight if len(weight) > 1 else (*weight, 0)
    if tuple(scale) == (outputs, 1, *[1] * len(kernel)):
        return True
    if tuple(scale) == (1, inputs, *[1] * len(kernel)):
        return False
    raise ValueError(f"a dora_scale of shape {tuple(scale)} where the model has {outputs} outputs and {inputs} inputs")


Sizes = Mapping[str, tuple[int, ...]]


def _lora_size(sizes: Sizes) -> tuple[int, int]:
    up, down = sizes["lora_up.weight"], sizes["lora_down.weight"]
    middle = sizes.get("lora_mid.weight")
    if middle is not None:
        _require_equal(middle[1], down[0])
        down = (middle[0], down[1], *middle[2:])
    _require_equal(math.prod(up[1:]), down[0])
    return up[0], math.prod(down[1:])


def _loha_size(sizes: Sizes) -> tuple[int, int]:
    first, second = (
        _product_size(sizes[f"hada_w{i}_a"], sizes[f"hada_w{i}_b"], sizes.get(f"hada_t{i}")) for i in ("1", "2")
    )
    _require_equal(first, second)
    return first


def _lokr_size(sizes: Sizes) -> tuple[int, int]:
    factors = []
    for i in ("1", "2"):
        if whole := sizes.get(f"lokr_w{i}"):
            factors.append((whole[0], math.prod(whole[1:])))
        else:
            factors.append(_product_size(sizes[f"lokr_w{i}_a"], sizes[f"lokr_w{i}_b"], sizes.get(f"lokr_t{i}")))
    (rows, columns), (more_rows, more_columns) = factors
    return rows * more_rows, columns * more_columns


def _product_size(a: Sequence[int], b: Sequence[int], middle: Sequence[int] | None) -> tuple[int, int]:
    """Outputs, and inputs times the kernel's size, of `_product`."""
    if middle is None:
        _require_equal(a[1:], b[:1])
        return a[0], b[1]
    _require_equal(middle[:2], (a[0], b[0]))
    return a[1], b[1] * math.prod(middle[2:])


def _require_equal(one: object, other: object) -> None:
    if one != other:
        raise ValueError(f"tensors of sizes {one} and {other} where they must be equal")


_SIZES: Mapping[str, Callable[[Sizes], tuple[int, int]]] = {
    "LoRA": _lora_size,
    "LoHa": _loha_size,
    "LoKr": _lokr_size,
}
"""Outputs of a change, and inputs times the kernel's size, by the sizes of its tensors."""


Delta = tuple[Tensor, int | None]
"""A change in any shape of as many elements as the weight, and the rank that alpha is divided by, if it is."""


def _lora(parts: Parts, weight: Tensor, strength: float, alpha: float | None) -> Delta:
    """up · down; in between mid (rank, rank, k, k)."""
    up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"]
    rank = down.shape[0]
    if "lora_mid.weight" in parts:
        down = torch.einsum("or...,ri->oi...", parts["lora_mid.weight"], down.flatten(1))
    return up @ down.flatten(1), rank


def _loha(parts: Parts, weight: Tensor, strength: float, alpha: float | None) -> Delta:
    """(w1_a · w1_b) ∘ (w2_a · w2_b), product by elements."""
    first, second = (
        _product(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")) for i in ("1", "2")
    )
    return first * second, parts["hada_w1_b"].shape[0]


def _lokr(parts: Parts, weight: Tensor, strength: float, alpha: float | None) -> Delta:
    """w1 ⊗ w2 (Kronecker); alpha counts only where one of them is a product of two."""
    first, second, rank = parts.get("lokr_w1"), parts.get("lokr_w2"), None
    if first is None:  # a rank of w2 counts before this one
        first, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], parts["lokr_w1_b"].shape[0]
    if second is None:
        second = _product(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
        rank = parts["lokr_w2_b"].shape[0]
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous()), rank


def _product(a: Tensor, b: Tensor, middle: Tensor | None) -> Tensor:
    """a · b; with a middle tensor (r, r, k, k) the sum of a[i, o] middle[i, j] b[j, n] over both ranks."""
    return a @ b if middle is None else torch.einsum("ij...,jn,io->on...", middle, b, a)


def _glora(parts: Parts, weight: Tensor, strength: float, alpha: float | None) -> Delta:
    """W · a1 · a2 + b1 · b2; in LyCORIS' older order W · a2 · a1 + b2 · b1."""
    a1, a2, b1, b2 = (parts[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    older = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    newer = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    square = a2.shape[0] == weight.shape[0] == weight.shape[1]
    if older and (square or not newer):
        return b2 @ b1 + weight.flatten(1) @ a2 @ a1, a1.shape[0]
    return _shaped(b1 @ b2, weight) + torch.einsum("oi...,ir,rn->on...", weight, a1, a2), a2.shape[0]


def _oft(parts: Parts, weight: Tensor, strength: float, alpha: float | None) -> Delta:
    """Each block of outputs turned by R, strength · (R - 1) · W."""
    count, size = parts["oft_blocks"].shape[:2]
    change = _rotations(parts["oft_blocks"], alpha) - torch.eye(size).to(weight)
    blocks = weight.unflatten(0, (count, size))
    return strength * torch.einsum("knm,kn...->km...", change, blocks).flatten(0, 1), None


def _boft(parts: Parts, weight: Tensor, strength: float, alpha: float | None) -> Delta:
    """Outputs turned block by block on every level of a butterfly, whose blocks mix ever further outputs."""
    size = parts["oft_blocks"].shape[-1]
    rotations = strength * _rotations(parts["oft_blocks"], alpha) + (1 - strength) * torch.eye(size).to(weight)
    rows = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    for level, rotation in enumerate(rotations):
        span = 2**level * (size // 2)
        blocks = rows.unflatten(0, (-1, 2, span)).transpose(1, 2).reshape(-1, size, rows.shape[1])
        turned = torch.einsum("bij,bjn->bin", rotation, blocks)
        rows = turned.reshape(-1, span, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
    turned = rows.reshape(weight.shape)
    return turned * parts.get("rescale", torch.ones(()).to(weight)) - weight, None


def _rotations(blocks: Tensor, alpha: float | None) -> Tensor:
    """Cayley's (1 + Q)(1 - Q)⁻¹ of Q = B - Bᵀ, which is first shortened to the norm alpha where that is above 0."""
    skew = blocks - blocks.transpose(-1, -2)
    if alpha is not None and alpha > 0:
        skew = skew * (alpha / (skew.norm() + 1e-8)).clamp(max=1.0)
    one = torch.eye(blocks.shape[-1]).to(blocks)
    return (one + skew) @ torch.linalg.inv(one - skew)


def _whole(name: str) -> Callable[..., Delta]:
    return lambda parts, weight, strength, alpha: (parts[name], None)


_FORMULAS: Mapping[str, Callable[[Parts, Tensor, float, float | None], Delta]] = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "GLoRA": _glora,
    "OFT": _oft,
    "BOFT": _boft,
    "norm": _whole("w_norm"),
    "diff": _whole("diff"),
}
