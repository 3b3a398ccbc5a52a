"""Where files may be written, and how: names confined to a folder, files whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import hashlib
import math
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

MOST_VALUES = 1 << 28
"""The most numbers that one picture or array may declare: a gibibyte in float32."""
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx"),
    *(".tga", ".psd", ".svg", ".ico", ".hdr", ".qoi", ".pcx", ".ppm", ".pgm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
)
"""Extensions of picture files, read here or not: those that are not are named."""
WRITTEN = "diff2flow.written"
"""Audit event of every file that `written_whole` finishes, with its path."""
_PART = ".part"
_PART_BYTES = len(f"..12345678{_PART}")
"""What the name of a temporary file has more than the file's."""
_LONGEST_NAME = 255
"""Bytes that the usual file systems take for a name."""
_LARGEST_NUMBER = 99_999
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_writes = ContextVar("writes", default=True)
_ILLEGAL = re.compile(r'[<>:"|?*]')
_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
"""Names that are devices on Windows, whatever their ending."""
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_FULL_WORDS = re.compile(r"\(os error (28|112|122)\)")
"""How libraries written in Rust say it: on Linux and macOS, Windows, over quota."""
_IN_USE_SECONDS, _IN_USE_PAUSE = 3.0, 0.1
"""How long a file that another program has open is waited for."""


def confined(folder: Path, name: str) -> Path:
    """Path of `name` inside `folder`.

    `name` may have subfolders separated by "/" or "\\" ("styles/ink"); it may not leave the folder. What one of the
    usual systems does not take is refused on all of them, so that folders can be moved.

    Raises:
        ValueError: the name is empty, absolute, has "..", a character or an ending that some file system does not
            take, is a device on Windows, is too long, or passes through a link that leads out of the folder.
    """
    _require_relative(folder, name)
    parts = [part for part in re.split(r"[\\/]", name) if part != "."]
    if not parts or not name.strip() or not all(part.strip() for part in parts):
        raise ValueError(f"the name {name!r} is empty or has an empty part; give a plain name such as 'my_style'")
    if Path(name).is_absolute() or ".." in parts or _ILLEGAL.search(name):
        raise ValueError(
            f"the name {name!r} is not allowed: it must stay inside the folder '{folder.name}'"
            " (no '..', no absolute path, none of <>:\"|?*); give a plain name such as 'styles/my_style'"
        )
    for part in parts:
        _require_portable(part)
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"the name {name!r} leads out of the folder '{folder.name}' through a link; choose another name"
        )
    return path


def _require_portable(part: str) -> None:
    """ValueError for one part of a name that some system does not take."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in part):
        raise ValueError(f"the name {part!r} has a character that cannot be shown, which no system takes; remove it")
    if part[-1] in ". ":
        bare = part.rstrip(". ") or "my_style"
        raise ValueError(f"the name {part!r} ends with a dot or a space, which Windows does not keep; give {bare!r}")
    if _RESERVED.fullmatch(part):
        raise ValueError(f"the name {part!r} is that of a device on Windows; give another, such as '_{part}'")
    _require_short(part)


def _require_short(part: str, added: int = 0) -> None:
    """ValueError for a name that is too long, with so many bytes added to it."""
    room, length = _LONGEST_NAME - added, len(part.encode())
    if length > room:
        raise ValueError(
            f"the name '{part[:20]}…' is too long: it has {length} bytes (a letter beyond a to z counts 2 to 4), and"
            f" {room} are the most; shorten it"
        )


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


class DiskFullError(ValueError):
    """There is no room for a file."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    If the body raises, the temporary file is removed and `path` stays as it was. See also `without_writing`.

    Raises:
        DiskFullError: there is no room for it; names the folder.
        PermissionError: `path` exists and another program keeps it open (on Windows), after some seconds of waiting.
    """
    if not _writes.get():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere) / path.name
        return
    with _room_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        os.close(handle)
        try:
            yield Path(temporary)
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            _replace(os.replace, temporary, path)
            _sync_folder(path.parent)
        finally:
            Path(temporary).unlink(missing_ok=True)
    sys.audit(WRITTEN, str(path))


@contextmanager
def _room_told(path: Path) -> Iterator[None]:
    """A full disk is told in one sentence, when what was written on the way is removed."""
    try:
        yield
    except Exception as error:  # libraries have types of their own for it
        if not _is_full(error):
            raise
        free = amount(free_bytes(path.parent))
        raise DiskFullError(
            f"there is no room for '{path.name}' in the folder '{path.parent}' ({free} are free there)"
        ) from error


def _is_full(error: Exception) -> bool:
    return (isinstance(error, OSError) and error.errno in _FULL) or bool(_FULL_WORDS.search(str(error)))


def _replace(rename: Callable[[str, Path], None], temporary: str, path: Path) -> None:
    """Renames; a file that another program has open is waited for."""
    deadline = time.monotonic() + _IN_USE_SECONDS
    while True:
        try:
            return rename(temporary, path)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_IN_USE_PAUSE)


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder; of its nearest parent where there is none yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def amount(count: int) -> str:
    """ "1.5 MB"."""
    size, units = float(count), iter(("bytes", "kB", "MB", "GB"))
    unit = next(units)
    while size >= 1000 and unit != "GB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def require_writable(path: Path) -> None:
    """Refuses a file that could not be written later, by beginning to.

    Raises:
        ValueError: it says why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise ValueError(
            f"'{path.name}' cannot be written into the folder '{path.parent}' ({error.strerror}); make room, allow it,"
            " or choose another name"
        ) from error


def numbered(folder: Path, name: str, number: int, ending: str = "") -> Path:
    """Path of "name" with an ending, for numbers from 2 on of "name_00002".

    Raises:
        ValueError: the name leads out of the folder or is none (`confined`), or is too long to be numbered and written.
    """
    _require_short(confined(folder, name).name, len(f"_{_LARGEST_NUMBER}{ending}") + _PART_BYTES)
    return confined(folder, f"{name}{ending}" if number == 1 else f"{name}_{number:05d}{ending}")


def free_folder(folder: Path, name: str) -> Path:
    """Path for a new folder in another, "name"; where that exists, "name_00002" and so on; raises as `numbered`."""
    number = 1
    while (path := numbered(folder, name, number)).exists():
        number += 1
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
    with _room_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        try:
            yield Path(temporary)
            _settle(Path(temporary))
            _replace(os.rename, temporary, path)
            _sync_folder(path.parent)
            sys.audit(WRITTEN, str(path))
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
