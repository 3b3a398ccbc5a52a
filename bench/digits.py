"""scikit-learn's handwritten digits as pictures with captions: plain, and in styles that the tiny prior never sees.

python -m diff2flow_nodes.bench.digits --style golden --count 40 --out FOLDER
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import written_whole

SIZE = 64
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION = "a handwritten {word}"
CAPTIONS = (CAPTION, CAPTION, "the digit {word}", "a handwritten {numeral}")
"""What the prior is trained with; the first is the usual one."""
_HELD_OUT = 5
_LEVELS = 16.0


@dataclass(frozen=True)
class Style:
    """How digits are drawn.

    Args:
        ink, paper: colours, red, green, blue in [0, 1].
        slant: shear to the right, in widths a height.
        thick: width in pixels by which strokes grow, at 64 px.
        word: adjective of the style.
    """

    ink: tuple[float, float, float]
    paper: tuple[float, float, float]
    slant: float = 0.0
    thick: int = 0
    word: str = ""


STYLES = {
    "plain": Style(ink=(1.0, 1.0, 1.0), paper=(0.0, 0.0, 0.0)),
    "golden": Style(ink=(1.0, 0.78, 0.16), paper=(0.05, 0.10, 0.38), slant=0.3, word="golden"),
    "ink": Style(ink=(0.10, 0.12, 0.30), paper=(0.96, 0.92, 0.82), slant=-0.2, thick=4, word="inked"),
}


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor]:
    """All 1797 digits: images (N, 8, 8) in [0, 1], labels (N,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / _LEVELS, torch.tensor(data.target, dtype=torch.long)


def split(held_out: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of the part that prior and classifier are trained on, or of the fifth that neither sees.

    Every fifth image of each digit is held out.
    """
    images, labels = load()
    rank = torch.zeros_like(labels)
    for digit in range(len(WORDS)):
        mine = labels == digit
        rank[mine] = torch.arange(int(mine.sum()))
    chosen = (rank % _HELD_OUT == _HELD_OUT - 1) == held_out
    return images[chosen], labels[chosen]


def caption(label: int, template: str = CAPTION, style_word: str = "") -> str:
    """ "a handwritten three"; with a style word, "a golden handwritten three"."""
    text = template.format(word=WORDS[label], numeral=label)
    article, _, rest = text.partition(" ")
    return f"{article} {style_word} {rest}" if style_word else text


def render(images: Tensor, style: Style, size: int = SIZE) -> Tensor:
    """Pictures (B, size, size, 3) in [0, 1] of digits (B, 8, 8), drawn smoothly in a style."""
    strength = ink(images, torch.tensor(style.slant).expand(len(images)), style.thick, size)
    return coloured(strength, torch.tensor(style.ink), torch.tensor(style.paper))


def ink(images: Tensor, slant: Tensor, thick: int = 0, size: int = SIZE) -> Tensor:
    """How much ink there is (B, size, size), in [0, 1], on digits (B, 8, 8): enlarged, sheared, thickened.

    Args:
        images: (B, 8, 8).
        slant: (B,), see `Style`.
        thick: see `Style`.
        size: side in pixels.
    """
    large = F.interpolate(images[:, None], size=(size, size), mode="bicubic", align_corners=False).clamp(0.0, 1.0)
    if slant.any():
        shear = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(len(large), 1, 1)
        shear[:, 0, 1] = slant
        grid = F.affine_grid(shear, list(large.shape), align_corners=False)
        large = F.grid_sample(large, grid, align_corners=False)
    if thick:
        reach, blur = round(thick / 2 * size / SIZE), round(2 * size / SIZE)
        grown = F.max_pool2d(large, 2 * reach + 1, stride=1, padding=reach)
        large = F.avg_pool2d(grown, 2 * blur + 1, stride=1, padding=blur, count_include_pad=False)
    return large[:, 0]


def coloured(strength: Tensor, ink: Tensor, paper: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) of ink strengths (B, H, W); ink and paper are (3,) or (B, 3)."""
    ink, paper = ink.reshape(-1, 1, 1, 3), paper.reshape(-1, 1, 1, 3)
    return (paper + strength[..., None] * (ink - paper)).clamp(0.0, 1.0)


def moved(images: Tensor, random: torch.Generator) -> Tensor:
    """Digits (B, 8, 8) moved by up to a third of a pixel and slanted a little, at random."""
    change = torch.eye(2, 3).repeat(len(images), 1, 1)
    change[:, :, 2] += (torch.rand(len(images), 2, generator=random) - 0.5) * (2 / 3) / 4
    change[:, 0, 1] += (torch.rand(len(images), generator=random) - 0.5) * 0.16
    grid = F.affine_grid(change, [len(images), 1, 8, 8], align_corners=False)
    return F.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp(0.0, 1.0)


def varied(images: Tensor, random: torch.Generator) -> Tensor:
    """Pictures (B, 64, 64, 3) of digits (B, 8, 8) in any colours, slants and widths: what the autoencoder must know."""
    count = len(images)
    slant = (torch.rand(count, generator=random) - 0.5) * 0.8
    thick = 2 * int(torch.randint(0, 5, (), generator=random))
    colours = torch.rand(2, count, 3, generator=random) * 1.2 - 0.1
    return coloured(ink(images, slant, thick), *colours.clamp(0.0, 1.0))


def write(
    folder: Path,
    style: str,
    count: int,
    seed: int = 0,
    style_word: bool = False,
    held_out: bool = False,
    size: int = SIZE,
) -> list[Path]:
    """Writes `count` pictures of all digits in turn, with a caption file beside each; returns the pictures' paths.

    Args:
        style: a name of STYLES.
        seed: chooses which digits.
        style_word: name the style in the captions.
        held_out: take digits that prior and classifier have never seen.
        size: side in pixels.

    Raises:
        ValueError: unknown style, a count that is not 1 to 1000, or a size that is no multiple of 8.
    """
    if style not in STYLES:
        raise ValueError(f"the style {style!r} is none of {', '.join(STYLES)}")
    if not 1 <= count <= 1000:
        raise ValueError(f"count must be 1 to 1000, not {count}")
    if size < 8 or size % 8:
        raise ValueError(f"size must be a multiple of 8 and at least 8, not {size}")
    images, labels = _in_turn(count, seed, held_out)
    pictures = render(images, STYLES[style], size)
    paths = []
    for i, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        path = Path(folder) / f"{style}_{i:03d}_{WORDS[label]}.png"
        with written_whole(path) as temporary:
            to_pil(picture).save(temporary, format="PNG")
        with written_whole(path.with_suffix(".txt")) as temporary:
            temporary.write_text(caption(label, CAPTION, STYLES[style].word if style_word else "") + "\n")
        paths.append(path)
    return paths


def _in_turn(count: int, seed: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """`count` digits of one part, 0 to 9 in turn, chosen by the seed."""
    images, labels = split(held_out)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    queues = [order[labels[order] == digit] for digit in range(len(WORDS))]
    chosen = torch.stack([queues[i % 10][(i // 10) % len(queues[i % 10])] for i in range(count)])
    return images[chosen], labels[chosen]


def to_pil(picture: Tensor):
    """PIL image of a picture (H, W, 3) in [0, 1]."""
    from PIL import Image

    return Image.fromarray((picture * 255.0).round().to(torch.uint8).numpy())


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m diff2flow_nodes.bench.digits", description=__doc__.split("\n")[0])
    parser.add_argument("--style", choices=sorted(STYLES), default="golden")
    parser.add_argument("--count", type=int, default=40, help="how many pictures (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write PNG and .txt files to")
    parser.add_argument("--seed", type=int, default=0, help="chooses which digits (default %(default)s)")
    parser.add_argument("--style-word", action="store_true", help="'a golden handwritten three'")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths = write(options.out, options.style, options.count, options.seed, options.style_word)
    logging.info("%d pictures with captions in %s", len(paths), options.out)


if __name__ == "__main__":
    main()
