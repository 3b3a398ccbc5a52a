"""The CLIP score: how well images show what their captions say."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def clip_score(pictures: Tensor, captions: Sequence[str], model: Path) -> float:
    """Mean of max(100 cos(image, caption), 0) over the images, by torchmetrics.

    Args:
        pictures: (N, H, W, 3) in [0, 1].
        captions: of each.
        model: folder of a CLIP model as transformers saves it, such as openai/clip-vit-large-patch14.

    Raises:
        ValueError: as many captions as images are needed; the folder is not there; torchmetrics or transformers is not
            installed.
    """
    if len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} images need as many captions, not {len(captions)}")
    if not (model / "config.json").is_file():
        raise ValueError(
            f"no CLIP model in {model}: save one there (huggingface-cli download openai/clip-vit-large-patch14"
            " --local-dir …); its config.json, weights and tokenizer are needed"
        )
    for package in ("torchmetrics", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the CLIP score needs {package}: pip install {package}")
    from torchmetrics.functional.multimodal import clip_score as scored

    images = [(picture.movedim(-1, 0).clamp(0, 1) * 255).round().byte() for picture in pictures]
    return float(scored(images, list(captions), model_name_or_path=str(model)))


def caption_of_each(lines: str, count: int) -> list[str]:
    """A caption for each of some images.

    Args:
        lines: one line for all, or as many as images.
        count: of the images.

    Raises:
        ValueError: another number of lines.
    """
    captions = [line.strip() for line in lines.splitlines() if line.strip()]
    if len(captions) not in (1, count):
        raise ValueError(f"captions must have 1 line or {count}, one for each of the samples, not {len(captions)}")
    return captions * count if len(captions) == 1 else captions
