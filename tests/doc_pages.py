"""The pages in docs/ and README.md, and what they claim of the code: links, headings, quoted messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("alignment", "samplers", "training", "depth", "metrics", "hosts", "nodes")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
_QUOTE = re.compile(r"\*\*`([^`]+)`\*\*")
VARIES = "…"
"""What stands in a quoted message for that which varies."""


def links_of(text: str) -> list[str]:
    """Targets of the links and pictures of a page that lead to no other site."""
    found = _LINK.findall(re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors_of(text: str) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    return {_anchor(title) for title in _HEADING.findall(_FENCE.sub("", text))}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    return [link for link in links_of(page.read_text(encoding="utf-8")) if not _leads_somewhere(page, link)]


def quotes_of(text: str) -> list[str]:
    """The messages that a page quotes: bold code, line breaks in it taken for blanks."""
    return [" ".join(quote.split()) for quote in _QUOTE.findall(text)]


def is_said(quote: str) -> bool:
    """Whether a message in the code begins so."""
    pattern = re.compile(".*?".join(re.escape(part) for part in quote.split(VARIES)))
    return any(pattern.match(message) for message in messages())


@cache
def messages() -> tuple[str, ...]:
    """Every text in the code of the rooms, with VARIES for what is put into it."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return tuple(text for path in (*files, ROOT / "files.py", ROOT / "cli.py") for text in _texts(path))


def _texts(path: Path) -> Iterator[str]:
    expressions = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    formatted = [expression for expression in expressions if isinstance(expression, ast.JoinedStr)]
    parts = {id(part) for expression in formatted for part in expression.values}
    for expression in formatted:
        yield "".join(part.value if isinstance(part, ast.Constant) else VARIES for part in expression.values)
    for expression in expressions:
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str) and id(expression) not in parts:
            yield re.sub(r"%[sd]", VARIES, expression.value)


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return False
    return not anchor or anchor in anchors_of(target.read_text(encoding="utf-8"))


def _anchor(title: str) -> str:
    """GitHub's: lower case, punctuation dropped, a hyphen for each blank."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
