"""Where files may be written, and how: names confined to a folder, files whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

MOST_VALUES = 1 << 28
"""The most numbers that one picture or array may declare: a gibibyte in float32."""
_PART = ".part"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_writes = ContextVar("writes", default=True)
_ILLEGAL = re.compile(r'[\x00-\x1f<>:"|?*]')


def confined(folder: Path, name: str) -> Path:
    """Path of `name` inside `folder`.

    `name` may have subfolders separated by "/" or "\\" ("styles/ink"); it may not leave the folder.

    Raises:
        ValueError: the name is empty, absolute, has "..", a character that no file system takes, or passes through
            a link that leads out of the folder.
    """
    _require_relative(folder, name)
    parts = [part for part in re.split(r"[\\/]", name) if part != "."]
    if not name.strip() or not all(part.strip() for part in parts):
        raise ValueError(f"the name {name!r} is empty or has an empty part; give a plain name such as 'my_style'")
    if Path(name).is_absolute() or ".." in parts or _ILLEGAL.search(name):
        raise ValueError(
            f"the name {name!r} is not allowed: it must stay inside the folder '{folder.name}'"
            " (no '..', no absolute path, none of <>:\"|?*); give a plain name such as 'styles/my_style'"
        )
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"the name {name!r} leads out of the folder '{folder.name}' through a link; choose another name"
        )
    return path


def _require_relative(folder: Path, name: str) -> None:
    """ValueError for a path of the whole machine and for one that ends with a slash, with the name to give instead."""
    given = name.strip()
    if re.match(r"[\\/]|[A-Za-z]:", given):
        path = Path(given)
        inside = path.is_absolute() and path != folder and path.is_relative_to(folder)
        plain = "give a plain name (what lies elsewhere must be copied there first)"
        instead = f"give {path.relative_to(folder).as_posix()!r}" if inside else plain
        raise ValueError(
            f"the name {name!r} is not allowed: it is an absolute path, and names are those inside the folder"
            f" '{folder.name}'; {instead}"
        )
    if given and given[-1] in "/\\":
        bare = given.rstrip("/\\")
        raise ValueError(f"the name {name!r} ends with a slash; give {bare!r}")


class TooLargeError(ValueError):
    """A file declares more numbers than are read."""


def require_size(name: str, shape: Sequence[int]) -> None:
    """Refuses a file that declares more than `MOST_VALUES`; called before memory is taken for them.

    Args:
        name: of the file.
        shape: that its header declares.

    Raises:
        TooLargeError: names the file, its size and what to do.
    """
    if math.prod(shape) > MOST_VALUES:
        raise TooLargeError(
            f"'{name}' says that it holds {'×'.join(map(str, shape))} values, and more than {MOST_VALUES} are not read;"
            " scale it down, or split it"
        )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    If the body raises, the temporary file is removed and `path` stays as it was. See also `without_writing`.
    """
    if not _writes.get():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def free_folder(folder: Path, name: str) -> Path:
    """Path for a new folder in another, "name"; where that exists, "name_00002" and so on.

    Raises:
        ValueError: the name leads out of the folder or is none (`confined`).
    """
    path, number = confined(folder, name), 2
    while path.exists():
        path, number = confined(folder, f"{name}_{number:05d}"), number + 1
    return path


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`; on success its files are flushed to disk and it is renamed.

    If the body raises, the temporary folder is removed and `path` is not there. See also `without_writing`.

    Raises:
        ValueError: `path` exists.
    """
    if not _writes.get():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    if path.exists():
        raise ValueError(f"'{path.name}' exists already; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART))
    try:
        yield temporary
        _settle(temporary)
        os.rename(temporary, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Everything in the folder on disk, with the usual rights."""
    mask = _umask()
    for inside in [folder, *folder.rglob("*")]:
        os.chmod(inside, (0o777 if inside.is_dir() else 0o666) & ~mask)
        if inside.is_dir():
            _sync_folder(inside)
            continue
        with open(inside, "rb+") as written:
            os.fsync(written.fileno())


def remove_parts(folder: Path, name: str = "*", hours: float = 0.0) -> None:
    """Removes what a killed process left of files that `written_whole` was writing in `folder`.

    Args:
        folder: nothing happens if there is none.
        name: of the files that were to be written.
        hours: leaves out what is younger: where another process may be writing.
    """
    oldest = time.time() - 3600.0 * hours
    for part in folder.glob(f".{glob.escape(name) if name != '*' else name}.*{_PART}"):
        with contextlib.suppress(OSError):
            if part.stat().st_mtime <= oldest:
                part.unlink()


@contextmanager
def without_writing() -> Iterator[None]:
    """What `written_whole` is given meanwhile is thrown away: for the processes of a run that are not its writer."""
    before = _writes.set(False)
    try:
        yield
    finally:
        _writes.reset(before)


def writes() -> bool:
    """Whether what `written_whole` is given now is kept."""
    return _writes.get()


def read_text(path: Path) -> str:
    """A text file as its byte order mark says (UTF-8, UTF-16 or UTF-32), UTF-8 without one.

    Raises:
        UnicodeDecodeError: it is no such text.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    text = data.decode(encoding)
    if "\0" in text:  # UTF-16 without a mark passes for UTF-8
        place = data.index(0)
        raise UnicodeDecodeError(encoding, data, place, place + 1, "it holds zeros, as UTF-16 does")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
