"""Random LoRA layers of every kind, and every spelling of their keys, for tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

RANK = 4
Draw = Callable[..., Tensor]


def layer(kind: str, shape: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a layer by kohya's and LyCORIS' endings, for a weight of that shape (out, in, ...)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 0.3

    name, _, option = kind.partition(" ")
    parts = _KINDS[name](draw, tuple(shape), option)
    if option != "no alpha" and name not in ("norm", "diff", "set"):
        parts["alpha"] = torch.tensor(2.0)
    if option == "dora":
        parts["dora_scale"] = draw(shape[0], *[1] * (len(shape) - 1)).abs() + 0.5
    if option == "dora of inputs":
        parts["dora_scale"] = draw(1, shape[1], *[1] * (len(shape) - 2)).abs() + 0.5
    return parts


LINEAR = (
    "lora", "lora no alpha", "lora dora", "lora dora of inputs", "loha", "loha no alpha", "loha dora", "lokr",
    "lokr both", "lokr no alpha", "lokr first", "lokr dora", "glora", "glora older", "glora no alpha", "oft",
    "oft no alpha", "boft", "boft rescale", "diff", "set",
)  # fmt: skip
CONVOLUTION = ("lora", "lora middle", "lora dora", "loha", "loha middle", "lokr", "lokr middle", "glora", "oft", "boft",
               "diff")  # fmt: skip


def _lora(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    outputs, inputs, *kernel = shape
    ones = [1] * len(kernel)
    parts = {"lora_up.weight": draw(outputs, RANK, *ones)}
    if option == "middle":
        return {**parts, "lora_down.weight": draw(RANK, inputs, *ones), "lora_mid.weight": draw(RANK, RANK, *kernel)}
    return {**parts, "lora_down.weight": draw(RANK, inputs, *kernel)}


def _loha(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    outputs, inputs, *kernel = shape
    parts = {}
    for i in ("1", "2"):
        if option == "middle":
            sizes = {f"w{i}_a": (RANK, outputs), f"w{i}_b": (RANK, inputs), f"t{i}": (RANK, RANK, *kernel)}
        else:
            sizes = {f"w{i}_a": (outputs, RANK), f"w{i}_b": (RANK, inputs * math.prod(kernel))}
        parts |= {f"hada_{name}": draw(*size) for name, size in sizes.items()}
    return parts


def _lokr(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    outputs, inputs, *kernel = shape
    first, second = (4, 2), (outputs // 4, inputs // 2, *kernel)
    if option == "no alpha" or option == "first":
        parts = {"lokr_w1_a": draw(first[0], 2), "lokr_w1_b": draw(2, first[1])}
    else:
        parts = {"lokr_w1": draw(*first)}
    if option == "middle":
        sizes = {"lokr_w2_a": (RANK, second[0]), "lokr_w2_b": (RANK, second[1]), "lokr_t2": (RANK, RANK, *kernel)}
        return {**parts, **{name: draw(*size) for name, size in sizes.items()}}
    if option in ("both", "no alpha", "dora"):
        return {**parts, "lokr_w2_a": draw(second[0], RANK), "lokr_w2_b": draw(RANK, math.prod(second[1:]))}
    return {**parts, "lokr_w2": draw(*second)}


def _glora(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    outputs, inputs = shape[0], math.prod(shape[1:])
    if option == "older":
        sizes = {"a1": (RANK, inputs), "a2": (inputs, RANK), "b1": (RANK, inputs), "b2": (outputs, RANK)}
    else:
        sizes = {"a1": (shape[1], RANK), "a2": (RANK, shape[1]), "b1": (outputs, RANK), "b2": (RANK, inputs)}
    return {f"{name}.weight": draw(*size) for name, size in sizes.items()}


def _oft(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    return {"oft_blocks": draw(shape[0] // 8, 8, 8)}


def _boft(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    parts = {"oft_blocks": draw(3, shape[0] // 8, 8, 8)}
    return {**parts, "rescale": draw(shape[0], *[1] * (len(shape) - 1)) + 1} if option == "rescale" else parts


def _norm(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    return {"w_norm": draw(*shape), "b_norm": draw(shape[0])}


def _diff(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    return {"diff": draw(*shape), "diff_b": draw(shape[0])}


def _set(draw: Draw, shape: tuple[int, ...], option: str) -> dict[str, Tensor]:
    return {"set_weight": draw(*shape)}


_KINDS: Mapping[str, Callable[[Draw, tuple[int, ...], str], dict[str, Tensor]]] = {
    "lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora, "oft": _oft, "boft": _boft, "norm": _norm,
    "diff": _diff, "set": _set,
}  # fmt: skip

ENDINGS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
"""How files call down and up."""


def spelled(name: str, shape: Sequence[int], endings: tuple[str, str]) -> dict[str, Tensor]:
    """A LoRA of one layer in a spelling."""
    parts = layer("lora no alpha", shape)
    return {
        f"{name}{end}": parts[part] for end, part in zip(endings, ("lora_down.weight", "lora_up.weight"), strict=True)
    }


def names(ldm: str, diffusers: str) -> tuple[str, ...]:
    """What files call a layer of the UNet, by its name in the checkpoint and in diffusers.

    Args:
        diffusers: of a query, key or value of an attention, or of its to_out.
    """
    processor = diffusers.replace(".to_", ".processor.to_").removesuffix(".0")
    flat = diffusers.replace(".", "_")
    return (
        f"lora_unet_{flat}", f"lora_unet_{ldm.replace('.', '_')}", f"lycoris_{flat}", f"diffusion_model.{ldm}",
        f"model.diffusion_model.{ldm}", f"base_model.model.diffusion_model.{ldm}", diffusers, f"unet.{diffusers}",
        processor, f"unet.{processor}", f"base_model.model.{diffusers}", f"unet.base_model.model.{diffusers}",
    )  # fmt: skip
