"""Full finetuning: every parameter of the network, for those who have the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from .checkpoint_file import require_base
from .insertion import WeightInsertion, float32_copies, own_weights
from .port import Backbone


class FullNetwork:
    """A network whose every parameter is trained.

    Args:
        tensors: key in the checkpoint -> trained parameter.
        size: number of trained parameters.
    """

    share = 1.0
    trains_text = False

    def __init__(self, tensors: Mapping[str, nn.Parameter], size: int) -> None:
        self.tensors, self.size = dict(tensors), size

    @property
    def describe(self) -> str:
        """ "training 859.52 M of 859.52 M parameters (100.00 %)"."""
        return f"training {self.size / 1e6:.2f} M of {self.size / 1e6:.2f} M parameters (100.00 %)"

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, float32, each once."""
        return list({id(parameter): parameter for parameter in self.tensors.values()}.values())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """All of them in "unet"."""
        return {"unet": self.parameters(), "text": []}

    def without_gradient(self) -> list[str]:
        """Keys in the checkpoint of the parameters that have no gradient."""
        return [key for key, tensor in self.tensors.items() if tensor.grad is None]

    def switched_off(self) -> AbstractContextManager[None]:
        """Cannot be.

        Raises:
            ValueError: always.
        """
        raise ValueError("a network that is trained in full cannot compute what it did before")

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Copies on the CPU by their keys in the checkpoint; `checkpoint_file.save_checkpoint` needs no such copy."""
        return {key: tensor.detach().to("cpu", dtype, copy=True) for key, tensor in self.tensors.items()}


@contextmanager
def trained_in_full(backbone: Backbone) -> Iterator[FullNetwork]:
    """Trainable float32 copies in place of the network's parameters; the very originals again when the context ends.

    The backbone takes its inputs in float32 meanwhile. Memory, beside the frozen originals: 4 bytes a parameter for
    the copies, 4 for the gradients, 8 for AdamW.

    Raises:
        ValueError: there is no base checkpoint that the result can be saved with (`checkpoint_file.require_base`).
    """
    require_base(backbone)
    network, dtype = backbone.module, backbone.dtype
    copies = float32_copies(own_weights(network), trained=True)
    insertion = WeightInsertion(network, copies)
    try:
        backbone.dtype = torch.float32
        trained = dict(network.named_parameters(remove_duplicate=False))
        tensors = {key: trained[path] for path, key in backbone.checkpoint_names().items() if path in trained}
        size = sum({id(copy): copy.numel() for copy in copies.values()}.values())
        with backbone.holding(insertion):
            yield FullNetwork(tensors, size)
    finally:
        backbone.dtype = dtype
        insertion.remove()
