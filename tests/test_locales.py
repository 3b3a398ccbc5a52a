"""The nodes' texts in other languages: complete, up to date, and saying the same numbers and names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS
from diff2flow_nodes.nodes.texts import LOCALES, as_json, english

OTHERS = ("de", "zh", "ja")
MESSAGE_SYNTAX = set("{}|@<>")
"""Characters that ComfyUI's page takes for placeholders, plurals, links or HTML in a translation."""
COMFYUIS_MENUS = {"loaders", "sampling", "training"}
"""Words of our menus that ComfyUI has in every language."""
SCRIPTS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]", "de": "[a-zäöüß]"}


@lru_cache
def locale(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(texts: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the keys that lead to it."""
    if isinstance(texts, str):
        yield path, texts
    else:
        for key, part in texts.items():
            yield from leaves(part, (*path, key))


def numbers(text: str) -> set[str]:
    """The numbers of a text; the 2 in the pack's own name is none."""
    return set(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text.replace("Diff2Flow", "")))


def test_english_is_what_the_nodes_say() -> None:
    written = (LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8")
    assert written == as_json(english()), "run python -m diff2flow_nodes.nodes.texts"


@pytest.mark.parametrize("language", OTHERS)
def test_languages_have_the_same_keys(language: str) -> None:
    here, there = (dict(leaves(locale(name))) for name in (language, "en"))
    lacking, needless = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
    assert not lacking and not needless, f"{language} lacks {lacking} and has {needless} too many"
    empty = [path for path, text in here.items() if not text.strip()]
    assert not empty


@pytest.mark.parametrize("language", OTHERS)
def test_translations_are_in_their_language(language: str) -> None:
    for path, text in leaves(locale(language)):
        if path[-1] in ("tooltip", "description"):
            assert re.search(SCRIPTS[language], text), f"{path} is not translated: {text}"
            assert text != dict(leaves(locale("en")))[path], f"{path} is not translated"


@pytest.mark.parametrize("language", OTHERS)
def test_translations_say_the_same_numbers(language: str) -> None:
    said = dict(leaves(locale(language)))
    wrong = {
        path: (numbers(text), numbers(said[path]))
        for path, text in leaves(locale("en"))
        if path[-1] in ("tooltip", "description") and numbers(text) != numbers(said[path])
    }
    assert not wrong


@pytest.mark.parametrize("language", OTHERS)
def test_translations_explain_the_same_choices(language: str) -> None:
    said = dict(leaves(locale(language)))
    for path, text in leaves(locale("en")):
        if path[-1] == "tooltip":
            choices = re.findall(r"(?:^|[.:;] )([a-z][\w-]*(?:, [a-z][\w-]*)*): ", text)
            names = {name for listed in choices for name in listed.split(", ")}
            lacking = [name for name in names if not re.search(rf"(?<![a-z]){name}(?![a-z])", said[path])]
            assert not lacking, f"{path} does not name {lacking}"


@pytest.mark.parametrize("language", OTHERS)
def test_translations_call_nodes_by_their_translated_names(language: str) -> None:
    names = {node["display_name"] for node in locale(language).values()}
    assert len(names) == len(locale(language))
    foreign = {node["display_name"] for node in locale("en").values()} - names
    for path, text in leaves(locale(language)):
        named = [name for name in foreign if re.search(rf"{name}(?![A-Za-z])", text)]
        rest = re.sub("|".join(sorted(map(re.escape, names), key=len, reverse=True)), "", text)
        assert not [name for name in named if re.search(rf"{name}(?![A-Za-z])", rest)], f"{path} names {named}"


@pytest.mark.parametrize("language", ("en", *OTHERS))
def test_texts_hold_nothing_that_the_page_would_interpret(language: str) -> None:
    for path, text in leaves(locale(language)):
        assert not MESSAGE_SYNTAX & set(text), f"{path}: {text}"


@pytest.mark.parametrize("language", ("en", *OTHERS))
def test_menus_are_translated(language: str) -> None:
    menus = {node.CATEGORY.removeprefix("Diff2Flow/") for node in NODE_CLASS_MAPPINGS.values()}
    words = json.loads((LOCALES / language / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    assert set(words) == menus - COMFYUIS_MENUS and all(words.values())
