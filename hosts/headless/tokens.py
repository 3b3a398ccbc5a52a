"""CLIP's tokenizer without a hub: its merges come with the package open_clip_torch, which is read, not imported."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..port import HostError

START, END = 49406, 49407

_MARKS = ("<|startoftext|>", "<|endoftext|>")
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP calls a word."""
_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_MERGE_COUNT = 49152 - 256 - 2
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


def tokenize(text: str) -> list[int]:
    """CLIP's token ids of a text, without start and end marks."""
    return _tokenizer().encode(text).ids


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    """CLIP's byte pair encoding: 256 byte symbols, the same at a word's end, the merges joined, the two marks."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    rules = merges()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(rules), merges=rules, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(list(_MARKS))
    return tokenizer


def vocabulary(rules: Sequence[tuple[str, str]]) -> dict[str, int]:
    """CLIP's words with their ids, from its merge rules."""
    symbols = _byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in rules), *_MARKS]
    return {word: i for i, word in enumerate(words)}


def _byte_symbols() -> list[str]:
    """One printable character for each byte, in CLIP's order: bytes that print as themselves, then the others."""
    others = range(256 - len(_PRINTABLE))
    return [chr(byte) for byte in _PRINTABLE] + [chr(256 + i) for i in others]


def merges() -> list[tuple[str, str]]:
    """The merge rules CLIP uses: the file's first 48,894 after its header."""
    lines = gzip.decompress(_merges_file().read_bytes()).decode("utf-8").split("\n")[1 : _MERGE_COUNT + 1]
    return [tuple(line.split()) for line in lines]  # type: ignore[misc]


def _merges_file() -> Path:
    spec = importlib.util.find_spec("open_clip")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / _MERGES).is_file():
        raise HostError(
            "CLIP's vocabulary is missing: headless reads it from the package open_clip_torch; install it with"
            " 'pip install --no-deps open_clip_torch'"
        )
    return folder / _MERGES
