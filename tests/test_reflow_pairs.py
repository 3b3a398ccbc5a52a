"""Reflow pairs: what is made, stopped, gone on with, shared among machines, damaged, killed, and read."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager

import pytest
import torch

from diff2flow_nodes.samplers import integrate
from diff2flow_nodes.samplers.parameterization import FlowParameterization
from diff2flow_nodes.tests import reflow_fakes
from diff2flow_nodes.tests.reflow_fakes import FLOW, PROMPTS, encode, make, maker, shards_of
from diff2flow_nodes.tests.training_fakes import SilentProgress, TinyBackbone
from diff2flow_nodes.training import teacher
from diff2flow_nodes.training.pairs import MANIFEST, PairStore, Run, Share, pair_noise
from diff2flow_nodes.training.teacher import BatchSize, TeacherSettings


class Stop(BaseException):
    """As ComfyUI's interruption: no Exception."""


class StopsAfter(SilentProgress):
    def __init__(self, updates):
        super().__init__()
        self.left = updates

    def update(self, done, text="", preview=None):
        self.left -= 1
        if self.left < 0:
            raise Stop


def contents(dataset):
    batch = dataset.batch(range(len(dataset)))
    return batch.latent, batch.noise, batch.context, batch.captions


def require_equal(one, other):
    assert one.pairs.tolist() == other.pairs.tolist()
    for a, b in zip(contents(one)[:3], contents(other)[:3], strict=True):
        assert torch.equal(a, b)
    assert contents(one)[3] == contents(other)[3]


def shards(folder):
    return sorted(folder.rglob("pairs-*.safetensors"))


def numbers_in(folder):
    from safetensors.torch import load_file

    found = []
    for path in shards(folder):
        first, stride, count = load_file(path)["pairs"].tolist()
        found += range(first, first + stride * count, stride)
    return found


@pytest.mark.parametrize("start", ["terminal", "noise"])
@pytest.mark.parametrize("cfg, solver", [(2.0, "euler"), (1.0, "heun")])
def test_a_pair_is_the_teachers_own_path(tmp_path, start, cfg, solver):
    flow = FlowParameterization(FLOW.alignment, start)
    backbone = TinyBackbone()
    made = make(tmp_path, 5, by=maker(backbone, flow), teacher=TeacherSettings(3, cfg, solver), batch_size=5,
                dtype="fp32", seed=9)  # fmt: skip
    assert set(backbone.batch_sizes) == {5 if cfg == 1.0 else 10}
    assert len(backbone.batch_sizes) == 3 * (2 if solver == "heun" else 1)
    batch = made.batch([3])
    caption = PROMPTS.at(3, 9)
    assert batch.captions == (caption,) and batch.sizes.tolist() == [[32, 32, 0, 0, 32, 32]]
    assert torch.equal(batch.noise[0], pair_noise((4, 4, 4), 9, 3)) and torch.equal(batch.context, encode(caption)[0])

    def velocity(x, t):
        x_diff, tau = flow.alignment.to_diffusion(x, t), flow.alignment.timestep(t).reshape(1)
        positive, negative = (backbone(x_diff, tau, {"context": encode(text)[0]}) for text in (caption, "ugly"))
        return flow.alignment.velocity(negative + cfg * (positive - negative), x, t)

    first = flow.t_start
    scale = 1.0 if start == "noise" else (first**2 + (1 - first) ** 2) ** 0.5
    with torch.no_grad():
        expected = integrate(velocity, scale * batch.noise, flow.times(3), solver, pole=1.0) / 0.5
    torch.testing.assert_close(batch.latent, expected, rtol=1e-4, atol=1e-5)


def test_stopped_anywhere_it_goes_on_to_the_very_same_pairs(tmp_path):
    whole = make(tmp_path / "whole", 7, batch_size=2)
    for stop in range(0, 30):  # in the prompts, in the first batches, between and behind them
        folder = tmp_path / str(stop)
        try:
            make(folder, 7, StopsAfter(stop), batch_size=2)
        except Stop:
            made = numbers_in(folder)
            assert made == list(range(len(made))) and len(made) in (0, 2, 4, 6, 7)
        require_equal(make(folder, 7, batch_size=2), whole)
        assert sorted(numbers_in(folder)) == list(range(7))


def test_the_page_hears_how_far_it_is_and_why_it_ended(tmp_path):
    progress = SilentProgress()
    make(tmp_path, 3, progress, batch_size=2)
    told = [entry for entry in progress.events if entry["kind"] == "pairs"]
    assert (told[0]["done"], told[-1]["done"], told[-1]["total"]) == (0, 3, 3)
    assert told[0]["seconds_left"] is None and told[-1]["seconds_left"] == 0.0 and told[-1]["steps_per_second"] > 0
    stopped = StopsAfter(9)
    with pytest.raises(Stop):
        make(tmp_path, 40, stopped, batch_size=2)
    assert stopped.events[-1]["kind"] == "failed" and stopped.events[-1]["error"] == "Stop"


def test_more_pairs_go_on_and_nothing_is_made_twice(tmp_path):
    with shards_of(3):
        make(tmp_path / "a", 8)
        backbone = TinyBackbone()
        more = make(tmp_path / "a", 14, by=maker(backbone))
    assert len(backbone.batch_sizes) == 6 * 3
    require_equal(more, make(tmp_path / "b", 14))
    fewer = make(tmp_path / "a", 5, by=maker(network=None))
    assert fewer.pairs.tolist() == list(range(5))


def test_shares_of_machines_are_the_whole_when_they_are_put_together(tmp_path):
    whole = make(tmp_path / "whole", 11)
    with shards_of(2):
        first = make(tmp_path / "one", 11, share=Share(1, 2))
        assert first.pairs.tolist() == [0, 2, 4, 6, 8, 10] and "5 of 11 pairs are missing" in first.summary()
        make(tmp_path / "two", 11, share=Share(2, 2))
    (tmp_path / "two").rename(tmp_path / "one" / "from the other machine")
    merged = make(tmp_path / "one", 11, by=maker(network=None))
    require_equal(merged, whole)
    assert sorted(numbers_in(tmp_path / "one")) == list(range(11)) and merged.identity() == whole.identity()
    assert first.identity() != whole.identity()
    with pytest.raises(ValueError, match=r"shard must be from 1 to shards \(2\), not 3"):
        Share(3, 2)


@pytest.mark.parametrize("how", ["cut", "altered", "empty"])
def test_a_damaged_shard_is_named_and_skipped_or_refused(tmp_path, how):
    with shards_of(3):
        whole = make(tmp_path, 9)
        bad = shards(tmp_path)[1]
        data = bytearray(bad.read_bytes())
        data[-30] ^= 1
        bad.write_bytes({"cut": bytes(data[:-40]), "altered": bytes(data), "empty": b""}[how])
        with pytest.raises(ValueError, match=f"damaged is 'refuse' and 1 shards in .* {bad.name}"):
            make(tmp_path, 9, damaged="refuse")
        skipping = make(tmp_path, 9, share=Share(9, 9))
        assert skipping.pairs.tolist() == [0, 1, 2, 6, 7, 8]
        assert f"1 damaged shards skipped: {bad.name}" in skipping.summary()
        backbone = TinyBackbone()
        again = make(tmp_path, 9, by=maker(backbone))
    assert len(backbone.batch_sizes) == 3 * 3 and "skipped" not in again.summary()
    require_equal(again, whole)
    require_equal(make(tmp_path, 9, damaged="refuse", by=maker(network=None)), whole)


def test_damage_behind_the_datasets_back_is_found_when_read(tmp_path):
    make(tmp_path, 6)
    dataset = make(tmp_path, 6, by=maker(network=None))
    dataset.store._open.clear()
    dataset.store._verified.clear()
    [shard] = shards(tmp_path)
    data = bytearray(shard.read_bytes())
    data[-200] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"the shard {shard.name} .* was damaged or removed since"):
        dataset.batch([0])


def test_other_settings_are_refused_by_name(tmp_path):
    make(tmp_path / "pairs", 3)
    with pytest.raises(ValueError, match=r"folder: 'pairs' holds pairs made with other settings \(seed: 0 there, 1 he"):
        make(tmp_path / "pairs", 3, seed=1)
    with pytest.raises(ValueError, match="cfg: 2.0 there, 3.0 here"):
        make(tmp_path / "pairs", 3, teacher=TeacherSettings(3, 3.0))
    manifest = tmp_path / "pairs" / MANIFEST
    about = json.loads(manifest.read_text())["about"]
    assert about["teacher_sha256"] == "ab" * 32 and about["versions"]["torch"] == torch.__version__
    manifest.write_text("{")
    with pytest.raises(ValueError, match="manifest 'pairs/manifest.json' cannot be read"):
        make(tmp_path / "pairs", 3)
    manifest.unlink()
    foreign = make(tmp_path / "pairs", 3, seed=1)
    assert "made with other settings" in foreign.summary() and len(foreign) == 3 and len(shards(tmp_path)) == 2


def test_noise_that_is_drawn_otherwise_is_noticed(tmp_path, monkeypatch):
    dataset = make(tmp_path, 3)
    monkeypatch.setattr("diff2flow_nodes.training.pairs.pair_noise", lambda shape, seed, pair: torch.zeros(*shape))
    with pytest.raises(ValueError, match="noise of pair 1 cannot be drawn again"):
        dataset.batch([1])


def test_killed_twenty_times_nothing_is_lost_or_made_twice(tmp_path):
    count, draw, kills, seen = 480, random.Random(4), 0, set()
    folder = tmp_path / "killed"
    with killable(tmp_path / "timed", 20) as start:
        start()[1]()  # the server is up
        shutil.rmtree(tmp_path / "timed")
        began = time.monotonic()
        assert start()[1]() == 0
        a_while = time.monotonic() - began  # in which this machine starts, and makes 20 pairs
    with killable(folder, count) as start:
        for _ in range(20):
            process, ended = start()
            time.sleep(draw.uniform(0.0, 0.7 * a_while))
            os.kill(process, signal.SIGKILL)
            kills += ended() == signal.SIGKILL
            now = numbers_in(folder)
            assert len(now) == len(set(now)) and seen <= set(now)
            seen = set(now)
    assert kills == 20 and 0 < len(seen) < count
    require_equal(make(folder, count), make(tmp_path / "whole", count))
    assert sorted(numbers_in(folder)) == list(range(count)) and not list(folder.glob(".pairs-*"))


@contextmanager
def killable(folder, count):
    """A function that starts a process making pairs; its id, and a function that returns the signal it ended by."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, reflow_fakes.__file__, str(folder), str(count)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as server:

        def start():
            server.stdin.write("start\n")
            return int(server.stdout.readline()), lambda: int(server.stdout.readline())

        yield start
        server.stdin.close()


def test_memory_stays_flat_at_a_million_pairs(tmp_path):
    from safetensors.torch import save_file  # noqa: F401  (imported before memory is counted)

    count, each, identity = 1_000_000, 8000, {"made": "here"}
    store = PairStore(tmp_path, identity, 0, count)
    texts = tuple(f"prompt {i}" for i in range(each))
    for first in range(0, count, each):
        run = Run(first, 1, texts, torch.zeros(each, 1, 1, 1, dtype=torch.float16))
        with no_probes(store):
            store.write(run, Share())
    del store
    tracemalloc.start()
    store = PairStore(tmp_path, identity, 0, count)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store.present) == count and store.nbytes() == 8 * count and kept < 1e6
    assert store.caption(999_999) == "prompt 7999" and sum(1 for _ in store.captions()) == count


@contextmanager
def no_probes(store):
    """Writing a million noises takes a minute; here nobody reads them."""
    store.noise = lambda shape, pair: torch.zeros(shape)
    try:
        yield
    finally:
        del store.noise


def test_the_batch_is_halved_until_it_fits():
    tried = []

    def batch(most):
        tried.append(most)
        if most > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return most

    size = BatchSize(16, torch.device("cpu"))
    assert size.run(batch) == 2 and size.run(batch) == 2 and tried == [16, 8, 4, 2, 2]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        BatchSize(1, torch.device("cpu")).run(lambda most: batch(most + 3))
    assert BatchSize(0, torch.device("cpu")).now == 4


def test_the_largest_batch_that_fits_is_found(monkeypatch):
    each, fixed, room, peak = 300, 5000, {"free": 12_000}, 0

    def batch(most):
        nonlocal peak
        peak = fixed + each * most
        return most

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(teacher, "free_memory", lambda device: room["free"])
    size = BatchSize(0, torch.device("cuda"))
    sizes = [size.run(batch) for _ in range(4)]
    assert sizes == [1, 1, 1, 1]  # 5300 for one: two might not fit
    for free, best in ((1_000_000, 64), (50_000, int(0.85 * 50_000 // 925))):
        room["free"] = free
        size = BatchSize(0, torch.device("cuda"))
        assert [size.run(batch) for _ in range(4)] == [1, 8, best, best]


def test_a_teacher_that_diverges_stops_with_what_is_finished(tmp_path):
    class Diverging(TinyBackbone):
        def __call__(self, x_diff, tau, conditioning):
            out = super().__call__(x_diff, tau, conditioning)
            return out * float("nan") if len(self.batch_sizes) > 8 else out

    with pytest.raises(RuntimeError, match="NaN or infinite"):
        make(tmp_path, 6, by=maker(Diverging()))
    assert numbers_in(tmp_path) == [0, 1]


def _unequal(caption):
    """A context of as many times three tokens as the caption has words, one at least."""
    own = encode(caption)[0]
    return torch.cat([own + 0.1 * i for i in range(max(1, len(caption.split())))], dim=1), None


@pytest.mark.parametrize("negative", ["ugly", "ugly and grey"])
def test_captions_of_unequal_length_make_the_pairs_that_they_make_alone(tmp_path, negative):
    by = maker(encode=_unequal)
    alone = make(tmp_path / "alone", 6, by=by, negative=negative)
    together = make(tmp_path / "together", 6, by=by, negative=negative, batch_size=6)
    for pair in range(6):
        one, other = (pairs.batch([pair]) for pairs in (alone, together))
        assert one.captions == other.captions
        torch.testing.assert_close(one.latent.float(), other.latent.float(), atol=2e-3, rtol=0)
    assert len({_unequal(caption)[0].shape[1] for caption in together.captions()}) > 1
