"""Prompts of reflow pairs: lines of text with wildcards, expanded as a function of (seed, pair number)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files import confined, read_text

_FILE = re.compile(r"__([A-Za-z0-9](?:[\w./-]{0,253}?[A-Za-z0-9])?)__")
"""A wildcard: without a longest name, text that begins many of them would be read again from each."""
_DEPTH = 20
_INSERTED = 100_000
"""The most characters that wildcards may put into one prompt."""
_ESCAPED = {"\\{": "{", "\\}": "}", "\\|": "|"}
_TOKEN = re.compile(r"\\[{}|]|[{}|]")

Choose = Callable[[int], int]
"""A number of choices -> one of 0 .. choices - 1."""


class Lines(Sequence[str]):
    """Many short texts in one piece of memory: their UTF-8 bytes and 8 bytes each.

    Args:
        texts: read once.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        blob, ends = bytearray(), [0]
        for text in texts:
            blob += text.encode()
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), torch.tensor(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._blob[int(self._ends[index]) : int(self._ends[index + 1])].decode()

    def digest(self) -> str:
        """Hex SHA-256 of the texts and where they end."""
        sha = hashlib.sha256(self._ends.numpy().tobytes())
        sha.update(self._blob)
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Prompts:
    """What pairs are made of, one line after the other, again and again.

    Pair k has line k mod len(self), in which `{red|blue}` and `__colors__` (a line of the file colors.txt) are
    replaced by one of the choices; both may be nested, and `\\{`, `\\|`, `\\}` are the characters themselves. Which is
    chosen depends on the seed, the pair number and the place in the line alone.

    Args:
        lines: at least one.
        wildcards: lines of the files that they name, by name.
    """

    lines: Sequence[str]
    wildcards: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def at(self, pair: int, seed: int) -> str:
        """The caption of a pair."""
        line = self.lines[pair % len(self.lines)]
        if not _is_template(line):
            return line
        places = iter(range(1 << 30))

        def choose(count: int) -> int:
            text = f"{seed}/wildcard/{pair}/{next(places)}"
            return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count

        return " ".join(_Expansion(line, self.wildcards, choose).made().split())

    def templates(self) -> Iterator[str]:
        """Every line that a caption can be made of."""
        yield from self.lines
        for lines in self.wildcards.values():
            yield from lines

    def digest(self) -> str:
        """Hex SHA-256 of the lines and of the wildcards' lines."""
        sha = hashlib.sha256(_digest(self.lines).encode())
        for name in sorted(self.wildcards):
            sha.update(f"\n{name}\n{_digest(self.wildcards[name])}".encode())
        return sha.hexdigest()


def collected_prompts(text: str, file: Path | None, captions: Iterable[str], folder: Path) -> Prompts:
    """The prompts of a text, a file and a dataset, in this order, with the wildcard files that they name.

    Args:
        text: one prompt a line; empty lines do not count.
        file: UTF-8 text of the same kind, or None.
        captions: of a dataset; each counts once.
        folder: of the wildcard files, name.txt, in subfolders as well.

    Raises:
        ValueError: no prompt at all, a file that is not UTF-8, a brace without its partner, an unknown wildcard.
    """
    lines = Lines(_all_lines(text, file, captions))
    if not len(lines):
        raise ValueError(
            "prompts is empty: write one prompt a line, name a text file in prompts_file, or connect a dataset, whose"
            " captions are then taken"
        )
    return Prompts(lines, _wildcards(lines, folder))


def _all_lines(text: str, file: Path | None, captions: Iterable[str]) -> Iterator[str]:
    yield from _filled(text.splitlines())
    if file is not None:
        yield from _read(file, "prompts_file")
    yield from dict.fromkeys(_filled(captions))


def _filled(lines: Iterable[str]) -> Iterator[str]:
    return (" ".join(line.split()) for line in lines if line.strip())


def _read(file: Path, what: str) -> list[str]:
    try:
        return list(_filled(read_text(file).splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what}: '{file.name}' is not UTF-8 text ({error.reason}); save it as UTF-8, one prompt a line"
        ) from error


def _wildcards(lines: Iterable[str], folder: Path) -> dict[str, Lines]:
    """The files named in the lines, and in the lines of those files; every line is checked."""
    found: dict[str, Lines] = {}
    waiting: list[Iterable[str]] = [lines]
    while waiting:
        for line in waiting.pop():
            if not _is_template(line):
                continue
            _require_balance(line)
            for name in _FILE.findall(line):
                if name not in found:
                    found[name] = Lines(_read(_wildcard_file(folder, name, line), "prompts"))
                    _require_filled(found[name], name)
                    waiting.append(found[name])
    return found


def _wildcard_file(folder: Path, name: str, line: str) -> Path:
    path = confined(folder, f"{name}.txt")
    if not path.is_file():
        raise ValueError(
            f"prompts: '{_short(line)}' names the wildcard __{name}__, but there is no '{name}.txt' in the folder"
            f" '{folder.parent.name}/{folder.name}'; put it there, one choice a line, or write {{a|b}} instead"
        )
    return path


def _require_filled(lines: Lines, name: str) -> None:
    if not len(lines):
        raise ValueError(f"prompts: the wildcard file '{name}.txt' is empty; write one choice a line")


def _require_balance(line: str) -> None:
    depth = 0
    for token in _TOKEN.findall(line):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            break
    if depth:
        raise ValueError(
            f"prompts: '{_short(line)}' has a '{{' or '}}' without its partner; write {{a|b}} for a choice, or \\{{ and"
            " \\} for the characters themselves"
        )


class _Expansion:
    """A line with every choice made, from left to right; of a choice only the part that was chosen is looked at.

    Args:
        line: the template.
        wildcards: lines by the name of their file.
        choose: makes the choices.
    """

    def __init__(self, line: str, wildcards: Mapping[str, Sequence[str]], choose: Choose) -> None:
        self._line, self._wildcards, self._choose = line, wildcards, choose
        self._left = _INSERTED

    def made(self) -> str:
        """The prompt.

        Raises:
            ValueError: wildcards that name each other in a circle, or that put in more than a prompt holds.
        """
        return self._expanded(self._line, 0)

    def _expanded(self, text: str, depth: int) -> str:
        if depth > _DEPTH:
            raise ValueError(
                f"prompts: the wildcards in '{_short(text)}' name each other without end; break the circle"
            )
        made, place = [], 0
        while place < len(text):
            found = _FILE.match(text, place)
            if found and found[1] in self._wildcards:
                made.append(self._expanded(self._inserted(found[1]), depth + 1))
                place = found.end()
            elif text[place] == "{":
                options, place = _options(text, place)
                made.append(self._expanded(options[self._choose(len(options))], depth + 1))
            else:
                made.append(_ESCAPED.get(text[place : place + 2], text[place]))
                place += 2 if text[place : place + 2] in _ESCAPED else 1
        return "".join(made)

    def _inserted(self, name: str) -> str:
        """A line of a wildcard's file."""
        lines = self._wildcards[name]
        line = lines[self._choose(len(lines))]
        self._left -= len(line) + 1
        if self._left < 0:
            raise ValueError(
                f"prompts: the wildcards in '{_short(self._line)}' put more than {_INSERTED} characters into one prompt;"
                " let fewer of their lines name other wildcards"
            )
        return line


def _options(text: str, start: int) -> tuple[list[str], int]:
    """The choices of the brace at `start`, and the place behind its partner."""
    options, begin, depth = [], start + 1, 0
    for found in _TOKEN.finditer(text, start):
        token = found[0]
        depth += {"{": 1, "}": -1}.get(token, 0)
        if (token == "|" and depth == 1) or depth == 0:
            options.append(text[begin : found.start()])
            begin = found.end()
        if depth == 0:
            break
    return options, begin


def _is_template(line: str) -> bool:
    return "{" in line or "}" in line or _FILE.search(line) is not None


def _digest(lines: Sequence[str]) -> str:
    return (lines if isinstance(lines, Lines) else Lines(lines)).digest()


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
