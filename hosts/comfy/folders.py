"""ComfyUI's folders by kind."""

from __future__ import annotations

import hashlib
from pathlib import Path

import folder_paths

from ...files import confined
from ..port import FOLDERS, HostError

_MODEL_KINDS = ("checkpoints", "loras")
_OWN_KINDS = ("datasets", "metrics")


def names(kind: str) -> list[str]:
    """Sorted names of a kind: files for checkpoints and loras, subfolders for the others."""
    if kind in _MODEL_KINDS:
        return sorted(folder_paths.get_filename_list(kind))
    base = folder(kind)
    return sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_dir())


def path(kind: str, name: str) -> Path:
    """Path of what exists under that name.

    Raises:
        HostError: nothing has that name.
    """
    if kind in _MODEL_KINDS:
        found = folder_paths.get_full_path(kind, name)
        if found is None:
            raise HostError(f"there is no file '{name}' in the folder '{kind}'; choose one of the list, or refresh it")
        return Path(found)
    found = confined(folder(kind), name)
    if not found.exists():
        raise HostError(f"there is no '{name}' in ComfyUI's folder '{kind}' ({folder(kind)}); put it there first")
    return found


def folder(kind: str) -> Path:
    """Where files of a kind are written; made if missing."""
    if kind not in FOLDERS:
        raise ValueError(f"unknown kind of folder {kind!r}; the kinds are {', '.join(FOLDERS)}")
    directory = _directory(kind)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def state_of(kind: str) -> str:
    """Digest of the names, sizes and times of ComfyUI's files of one of its own kinds, such as "embeddings"."""
    states = []
    for name in sorted(folder_paths.get_filename_list(kind)):
        found = folder_paths.get_full_path(kind, name)
        if found is not None:
            about = Path(found).stat()
            states.append((name, about.st_size, about.st_mtime_ns))
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _directory(kind: str) -> Path:
    if kind in _MODEL_KINDS:
        return Path(folder_paths.get_folder_paths(kind)[0])
    if kind in _OWN_KINDS:
        return Path(folder_paths.models_dir) / kind
    return Path(folder_paths.get_directory_by_type(kind))
