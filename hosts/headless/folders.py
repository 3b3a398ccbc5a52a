"""The headless host's folders: ComfyUI's layout under three folders that the user names. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ...files import confined
from ..port import FOLDERS, HostError
from .workflow import closest

_EXTENSIONS = {
    "checkpoints": (".safetensors", ".sft", ".ckpt", ".pt", ".pth"),
    "loras": (".safetensors", ".sft"),
}


@dataclass(frozen=True)
class Folders:
    """Where files are: checkpoints, loras and datasets under `models`; temp (previews) under `output`."""

    models: Path
    input: Path
    output: Path

    def directory(self, kind: str) -> Path:
        """The folder of a kind, whether it exists or not."""
        if kind not in FOLDERS:
            raise ValueError(f"unknown kind of folder {kind!r}; the kinds are {', '.join(FOLDERS)}")
        if kind in ("input", "output"):
            return Path(getattr(self, kind))
        return self.output / "temp" if kind == "temp" else self.models / kind

    def folder(self, kind: str) -> Path:
        """The folder of a kind, made if missing."""
        path = self.directory(kind)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def names(self, kind: str) -> list[str]:
        """Sorted names with "/" between subfolders: files for checkpoints and loras, subfolders for the others."""
        base, extensions = self.directory(kind), _EXTENSIONS.get(kind)
        found = []
        for root, subfolders, files in os.walk(base, followlinks=True):
            wanted = subfolders if extensions is None else [f for f in files if f.lower().endswith(extensions)]
            found += [(Path(root) / name).relative_to(base).as_posix() for name in wanted]
        return sorted(found)

    def path(self, kind: str, name: str) -> Path:
        """Path of what exists under that name.

        Links are followed when reading checkpoints and loras: model collections are full of them.

        Raises:
            HostError: nothing has that name, or the name leads out of the folder.
        """
        base = self.directory(kind)
        if kind in _EXTENSIONS:
            parts = re.split(r"[\\/]", name)
            path = base.joinpath(*parts)
            if Path(name).is_absolute() or ".." in parts:
                raise HostError(f"the name {name!r} leads out of {base}; give a name inside that folder")
        else:
            path = _confined(base, name)
        if not path.exists():
            near = closest(name, self.names(kind))
            raise HostError(
                f"there is no {name!r} in {base}" + (f"; closest: {near}" if near else "; put it there first")
            )
        return path


def _confined(base: Path, name: str) -> Path:
    try:
        return confined(base, name)
    except ValueError as error:
        raise HostError(str(error)) from error
