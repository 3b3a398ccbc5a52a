"""A shard that is read a tensor at a time: any dtype, and nothing stays behind."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diff2flow_nodes.training.shard_file import ShardFile
from diff2flow_nodes.training.shards import DIGEST, require_whole

MAPS = Path("/proc/self/maps")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_written_is_read(path, dtype):
    tensors = {"image": (10 * torch.rand(3, 4, 8, 8)).to(dtype), "none": torch.zeros(0, 2, dtype=dtype)}
    save_file(tensors, path, {"made by": "a test"})
    file = ShardFile(path)
    assert sorted(file.keys()) == ["image", "none"] and file.metadata == {"made by": "a test"}
    for key, tensor in tensors.items():
        found = file.tensor(key)
        assert found.dtype == dtype and torch.equal(found, tensor) and file.shape(key) == tuple(tensor.shape)
    row = file.row("image", 2)
    assert row.dtype == dtype and torch.equal(row, tensors["image"][2])


def test_what_was_read_can_be_changed_without_changing_the_file(path):
    save_file({"image": torch.ones(2, 3)}, path)
    file = ShardFile(path)
    file.tensor("image").zero_()
    file.row("image", 0).zero_()
    assert torch.equal(ShardFile(path).tensor("image"), torch.ones(2, 3))


def _kept_each_time(read, times: int) -> list[int]:
    """Bytes by which Python's memory grew in each of some equal stretches."""
    gc.collect()
    tracemalloc.start()
    try:
        levels = []
        for _ in range(times + 1):
            read()
            gc.collect()
            levels.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return [after - before for before, after in pairwise(levels)]


def test_reading_leaves_nothing_behind(path):
    """What reading leaves, it leaves in every stretch; other threads and caches allocate in some."""
    save_file({"image": torch.ones(4, 8, 8)}, path)
    file, reads = ShardFile(path), 4000

    def read() -> None:
        for _ in range(reads // 2):
            file.tensor("image"), file.row("image", 1)

    assert min(_kept_each_time(read, 5)) < reads  # safetensors by itself leaves 50 bytes at each read


def test_something_left_behind_is_seen():
    left = []
    assert min(_kept_each_time(lambda: left.extend(object() for _ in range(1000)), 3)) > 1000


@pytest.mark.skipif(not MAPS.exists(), reason="looks at Linux's list of mapped files")
def test_a_damaged_shard_is_closed_when_it_is_refused(path):
    """Windows removes no file that is open, and the store removes a damaged one while it handles the exception."""
    save_file({"image": torch.ones(10_000)}, path, {DIGEST: "another"})
    with ShardFile(path):
        assert str(path) in MAPS.read_text()
    with pytest.raises(ValueError, match="checksum") as refused:
        require_whole(path)
    assert refused.tb and str(path) not in MAPS.read_text()


def test_a_file_that_was_cut_short_is_refused(path):
    save_file({"image": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(Exception, match="(?i)incomplete|size|header"):
        ShardFile(path)
