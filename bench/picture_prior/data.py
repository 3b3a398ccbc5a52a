"""The pictures with their captions: emoji of three styles to learn, a tenth of them held out, a fourth style unseen.

One array of all pictures and what each shows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...files import written_whole
from . import drawings, packages

log = logging.getLogger(__name__)

STYLES: Mapping[str, Callable[[Path], Iterator[drawings.Drawing]]] = {
    "noto": drawings.noto,
    "twemoji": drawings.twemoji,
    "fluent": drawings.fluent,
}
UNSEEN: Mapping[str, Callable[[Path], Iterator[drawings.Drawing]]] = {"openmoji": drawings.openmoji}
"""The style that the prior never sees: what it is finetuned on later."""
CATEGORIES = {
    0: "smileys and emotion",
    1: "people and body",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
}
"""emojibase's groups without flags and skin tones."""
_MIRRORED = (0, 1, 3, 4, 6)
"""Groups whose pictures mean the same seen in a mirror, if no word says otherwise; the others have writing."""
_SIDED = {"left", "right", "leftwards", "rightwards", "clockwise", "anticlockwise", "counterclockwise", "medal"}
_TENTHS = 10
_LEFT_OUT = ("1f595",)
"""The middle finger: nobody asks a demo for it."""


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Args:
        style: of STYLES or UNSEEN.
        hexcode: of the object.
        name: "red heart".
        keywords: other words for it.
        category: of CATEGORIES' values.
        mirrored: whether it may be shown mirrored.
        held_out: whether it is not learned from.
    """

    style: str
    hexcode: str
    name: str
    keywords: tuple[str, ...]
    category: str
    mirrored: bool
    held_out: bool


@dataclass(frozen=True)
class Pictures:
    """Pictures in one array.

    Args:
        pixels: uint8 (N, 128, 128, 3).
        about: N.
    """

    pixels: np.ndarray
    about: Sequence[Picture]

    def chosen(self, wanted: Callable[[Picture], bool]) -> Pictures:
        """Those that are wanted."""
        places = [i for i, picture in enumerate(self.about) if wanted(picture)]
        return Pictures(self.pixels[places], [self.about[i] for i in places])

    def images(self, places: Sequence[int] | None = None) -> Tensor:
        """Pictures (B, 128, 128, 3) in [0, 1], of some places or all."""
        return torch.from_numpy(self.pixels if places is None else self.pixels[places]).float() / 255.0


def held_out(hexcode: str, style: str, styles: Sequence[str]) -> bool:
    """Whether this pair of object and style is not learned from: a tenth, never more than one style of an object.

    Args:
        styles: that the object is drawn in, of STYLES.
    """
    number = int.from_bytes(hashlib.sha256(hexcode.encode()).digest()[:8], "big")
    drawn = [name for name in STYLES if name in styles]
    return len(drawn) > 1 and number % _TENTHS < len(drawn) and drawn[number % _TENTHS] == style


def build(folder: Path) -> None:
    """Fetches the packages and writes pictures.npz, pictures.json, unseen.npz and unseen.json.

    Args:
        folder: the work folder; the packages' archives go to its subfolder "packages".
    """
    names = _names(packages.NAMES.archive(folder / "packages"))
    for title, styles in (("pictures", STYLES), ("unseen", UNSEEN)):
        found = _drawn(styles, names, folder / "packages")
        _write(folder, title, found)
        held = sum(picture.held_out for picture in found.about)
        log.info("%s: %d pictures of %s, %d held out", title, len(found.about), ", ".join(styles), held)


def load(folder: Path, title: str = "pictures") -> Pictures:
    """The pictures that `build` wrote.

    Args:
        title: "pictures" or "unseen".

    Raises:
        RuntimeError: they are not there.
    """
    if not (folder / f"{title}.npz").is_file():
        raise RuntimeError(
            f"there are no pictures in {folder}: run 'python -m diff2flow_nodes.bench.picture_prior data'"
        )
    about = json.loads((folder / f"{title}.json").read_text(encoding="utf-8"))
    pictures = [Picture(**{**entry, "keywords": tuple(entry["keywords"])}) for entry in about["pictures"]]
    return Pictures(np.load(folder / f"{title}.npz")["pixels"], pictures)


def versions() -> dict[str, str]:
    """The packages' versions by their names."""
    return {package.name: package.version for package in packages.ALL}


def _names(archive: Path) -> dict[str, dict[str, Any]]:
    """emojibase's entries by hexcode, without flags, skin tones and those that only face the other way."""
    entries = packages.read_json(archive, "en/data.json")
    wanted = (entry for entry in entries if entry.get("group") in CATEGORIES and "facing right" not in entry["label"])
    found = {drawings.code(entry["hexcode"]): entry for entry in wanted}
    return {hexcode: entry for hexcode, entry in found.items() if hexcode not in _LEFT_OUT}


def _drawn(styles: Mapping[str, Any], names: Mapping[str, dict[str, Any]], folder: Path) -> Pictures:
    draw = {style: {code: d for code, d in make(folder) if code in names} for style, make in styles.items()}
    pixels, about = [], []
    for hexcode, entry in names.items():
        having = [style for style in styles if hexcode in draw[style]]
        for style in having:
            pixels.append(draw[style][hexcode]())
            about.append(_picture(style, hexcode, entry, having))
    return Pictures(np.stack(pixels), about)


def _picture(style: str, hexcode: str, entry: Mapping[str, Any], styles: Sequence[str]) -> Picture:
    name = entry["label"].lower().replace("⊛ ", "")
    keywords = tuple(word.lower() for word in entry.get("tags", ()) if word.lower() != name)
    words = set(name.replace("-", " ").split())
    mirrored = entry["group"] in _MIRRORED and not words & _SIDED
    category = CATEGORIES[entry["group"]]
    return Picture(style, hexcode, name, keywords, category, mirrored, held_out(hexcode, style, styles))


def _write(folder: Path, title: str, pictures: Pictures) -> None:
    with written_whole(folder / f"{title}.npz") as path, open(path, "wb") as file:
        np.savez_compressed(file, pixels=pictures.pixels)
    about = {"packages": versions(), "pictures": [asdict(picture) for picture in pictures.about]}
    with written_whole(folder / f"{title}.json") as path:
        path.write_text(json.dumps(about, ensure_ascii=False, indent=0), encoding="utf-8")
