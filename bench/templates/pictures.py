"""Composes the templates' thumbnails from pictures that the benches have left.

    python -m diff2flow_nodes.bench.templates.pictures --reflow DIR --finetune DIR --depth DIR --resolution DIR
        --black-white DIR

The folders hold the pictures of `reflow_quality`, `ablation`, `depth_quality`, the stage `resolution` and
`black_white`: the same nodes, at the tiny priors' size.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...files import written_whole
from . import FOLDER

SIZE = (400, 300)
_PAPER, _TEXT = "#f6f5f2", "#22252b"
_MARGIN, _GAP, _LABEL = 12, 5, 20


@dataclass(frozen=True)
class Strip:
    """A row of a thumbnail: some tiles of a picture, and what they are.

    Args:
        label: above them.
        source: name of the picture's folder on the command line.
        picture: file in it, a table of square tiles.
        tile: side of a tile, pixels.
        row: of the table.
        columns: of the table, those that are shown.
    """

    label: str
    source: str
    picture: str
    tile: int = 64
    row: int = 0
    columns: Sequence[int] = (2, 3, 4, 5, 6)


_DEPTH = "depth_diff2flow_0_ensemble.png"
_BLACK_WHITE = "{} 0, 25 steps, CFG 3.png"
_ALL = range(6)

THUMBNAILS: dict[str, tuple[Strip, ...]] = {
    "few_steps": (
        Strip("reflowed LoRA, 1 step", "reflow", "fast_0_1.png"),
        Strip("2 steps", "reflow", "fast_0_2.png"),
        Strip("4 steps", "reflow", "fast_0_4.png"),
    ),
    "finetune_and_sample": (
        Strip("before, 25 steps", "finetune", "base_0_25.png"),
        Strip("after, 25 steps", "finetune", "ablation_diff2flow_0_25.png"),
        Strip("after, 4 steps", "finetune", "ablation_diff2flow_0_4.png"),
    ),
    "reflow": (
        Strip("checkpoint, 25 steps", "reflow", "base_Euler_1_25.png"),
        Strip("checkpoint, 2 steps", "reflow", "base_Euler_1_2.png"),
        Strip("reflowed, 2 steps", "reflow", "fast_1_2.png"),
    ),
    "depth_estimation": (
        Strip("image", "depth", _DEPTH, columns=(2, 3, 6)),
        Strip("its estimated depth", "depth", _DEPTH, row=2, columns=(2, 3, 6)),
    ),
    "depth_training": (
        Strip("image", "depth", _DEPTH, columns=range(5)),
        Strip("true depth", "depth", _DEPTH, row=1, columns=range(5)),
        Strip("what the LoRA estimates", "depth", _DEPTH, row=2, columns=range(5)),
    ),
    "resolution_adaptation": (
        Strip(
            "another size than it knows: before", "resolution", "base_0_samples_10.png", tile=48, columns=(2, 3, 4, 5)
        ),
        Strip("after", "resolution", "diff2flow_0_after_60_samples_10.png", tile=48, columns=(2, 3, 4, 5)),
    ),
    "black_white": (
        Strip("'a black image', before", "black_white", _BLACK_WHITE.format("base"), columns=_ALL),
        Strip("after", "black_white", _BLACK_WHITE.format("diff2flow, full range"), columns=_ALL),
        Strip("'a white image', before", "black_white", _BLACK_WHITE.format("base"), row=1, columns=_ALL),
        Strip("after", "black_white", _BLACK_WHITE.format("diff2flow, full range"), row=1, columns=_ALL),
    ),
}
"""By template."""


def thumbnail(strips: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labels and the tiles below each, as large as fits."""
    width, height = SIZE
    count = max(len(tiles) for _, tiles in strips)
    side = min(
        (width - 2 * _MARGIN - (count - 1) * _GAP) // count,
        (height - 2 * _MARGIN - (len(strips) - 1) * _GAP) // len(strips) - _LABEL,
    )
    page = Image.new("RGB", SIZE, _PAPER)
    draw = ImageDraw.Draw(page)
    left = (width - count * side - (count - 1) * _GAP) // 2
    top = (height - len(strips) * (side + _LABEL) - (len(strips) - 1) * _GAP) // 2
    for label, tiles in strips:
        draw.text((left, top), label, _TEXT, ImageFont.load_default(14))
        for i, tile in enumerate(tiles):
            sized = tile.resize((side, side), Image.Resampling.LANCZOS)
            page.paste(sized, (left + i * (side + _GAP), top + _LABEL))
        top += side + _LABEL + _GAP
    return page


def tiles_of(strip: Strip, folder: Path) -> list[Image.Image]:
    """The tiles that a strip shows."""
    picture, side = Image.open(folder / strip.picture).convert("RGB"), strip.tile
    top = strip.row * side
    return [picture.crop((column * side, top, (column + 1) * side, top + side)) for column in strip.columns]


def write(name: str, folders: Mapping[str, Path]) -> Path:
    """Writes a template's thumbnail and returns its path."""
    picture = thumbnail([(strip.label, tiles_of(strip, folders[strip.source])) for strip in THUMBNAILS[name]])
    path = FOLDER / f"{name}.jpg"
    with written_whole(path) as temporary:
        picture.save(temporary, format="JPEG", quality=88)
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diff2flow_nodes.bench.templates.pictures", description=__doc__)
    sources = sorted({strip.source for strips in THUMBNAILS.values() for strip in strips})
    for source in sources:
        parser.add_argument(f"--{source.replace('_', '-')}", type=Path, required=True, metavar="DIR")
    folders = vars(parser.parse_args())
    for name in THUMBNAILS:
        print(write(name, folders))


if __name__ == "__main__":
    main()
