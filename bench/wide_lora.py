"""A LoRA of the narrow tiny prior as a file for the wide one, which ComfyUI loads."""

from __future__ import annotations

from pathlib import Path

from ..files import written_whole
from . import tiny_unet
from .tiny_prior import WIDTH, Quality
from .widen import widened_lora


def widen_file(narrow: Path, wide: Path, quality: Quality) -> Path:
    """Writes the LoRA for tiny_prior_<name>.safetensors and returns its path.

    Args:
        narrow: LoRA trained on tiny_prior_<name>_narrow.safetensors.
        wide: the file to write; float16, the metadata as they were.
        quality: of the prior.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(narrow), framework="pt") as file:
        lora = {key: file.get_tensor(key) for key in list(file.keys())}
        metadata = file.metadata()
    shapes = (tiny_unet.trainable_unet(width, quality.seed).state_dict() for width in (WIDTH // quality.copies, WIDTH))
    state = {key: value.half().contiguous() for key, value in widened_lora(lora, *shapes, quality.copies).items()}
    with written_whole(wide) as temporary:
        save_file(state, str(temporary), metadata)
    return wide
