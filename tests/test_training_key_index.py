"""The index of keys: like a dictionary, in far less memory."""

import random
import tracemalloc

import pytest

from diff2flow_nodes.training import key_index
from diff2flow_nodes.training.key_index import KeyIndex


def test_it_answers_as_a_dictionary_does(monkeypatch):
    monkeypatch.setattr(key_index, "_RECENT", 50)
    draw, index, known = random.Random(0), KeyIndex(), {}
    for number in range(60):
        keys = [f"key {draw.randrange(400)}" for _ in range(draw.randrange(20))]
        index.update(keys, number)
        known |= dict.fromkeys(keys, number)
        assert all(index[key] == known[key] for key in known)
    assert len(known) <= len(index) < len(known) + 50
    assert "key 0" in index and "another" not in index
    with pytest.raises(KeyError, match="another"):
        index["another"]


def test_many_keys_take_little_memory():
    index = KeyIndex()
    tracemalloc.start()
    for shard in range(20):
        index.update((f"caption {shard}/{i}" for i in range(10_000)), shard)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 200_000 and index["caption 19/9999"] == 19
    assert kept < 12 * 200_000 + 100 * key_index._RECENT
