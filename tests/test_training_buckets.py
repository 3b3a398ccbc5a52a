"""Sizes of images, and the order in which buckets are trained."""

import math
from collections import Counter

import pytest
import torch

from diff2flow_nodes.training import draws
from diff2flow_nodes.training.buckets import Sizes, bucket_sizes, cover, nearest_bucket, parsed_resolutions

BUCKETS = (tuple(range(7)), (7,), (8, 9, 8, 9))


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"), [(512, 64, 2.0), (1024, 64, 2.0), (768, 32, 3.0), (64, 8, 1)]
)
def test_buckets_have_the_area_the_step_and_the_aspect(resolution, step, aspect):
    sizes = bucket_sizes(resolution, step, aspect)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0 and width * height <= resolution**2
        assert max(width, height) <= aspect * min(width, height) and (height, width) in sizes
        # the larger side is as large as it can be
        assert (max(width, height) + step) * min(width, height) > resolution**2


def test_the_buckets_of_512_are_the_known_ones():
    wide = {(512, 512), (576, 448), (640, 384)}
    assert set(bucket_sizes(512, 64, 2.0)) == wide | {(h, w) for w, h in wide}


def test_images_go_to_the_bucket_nearest_in_log_aspect():
    sizes = Sizes(512, bucketing="aspect")
    assert sizes.of(512, 512) == ((512, 512),) and sizes.of(4000, 3000) == ((576, 448),)
    assert sizes.of(3000, 4000) == ((448, 576),) and sizes.of(9000, 100) == ((640, 384),)
    between = math.sqrt(576 / 448)  # in the middle in the logarithm, not in the ratio (1.143)
    assert nearest_bucket(1000 * 113, 100_000, 512, 64, 2.0) == (512, 512)
    assert nearest_bucket(round(1000 * (between + 0.002)), 1000, 512, 64, 2.0) == (576, 448)


def test_several_resolutions_give_each_size_once():
    assert Sizes(512, (768, 512)).of(30, 900) == ((512, 512), (768, 768))
    assert Sizes(256, (512,), "aspect").of(4000, 3000) == ((320, 192), (576, 448))


def test_without_upscaling_small_images_get_sizes_that_they_fill():
    sizes = Sizes(512, (1024,), "aspect", no_upscale=True)
    assert sizes.of(300, 200) == ((256, 192),)
    assert sizes.of(4000, 3000) == ((576, 448), (1152, 896))
    assert sizes.of(20, 20) == ((64, 64),)
    for original in ((300, 200), (700, 100), (513, 90)):
        for target in sizes.of(*original):
            assert cover(original, target).width <= original[0]


@pytest.mark.parametrize(
    ("original", "target", "expected"),
    [
        ((100, 50), (16, 16), (32, 16, 8, 0, 8)),
        ((50, 100), (16, 16), (16, 32, 0, 8, 0)),
        ((60, 32), (16, 16), (30, 16, 7, 0, 7)),
        ((62, 32), (16, 16), (31, 16, 7, 0, 8)),
        ((10, 10), (24, 16), (24, 24, 0, 4, 0)),
    ],
)
def test_images_cover_their_target(original, target, expected):
    place = cover(original, target)
    assert (place.width, place.height, place.left, place.top, place.right) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 20}, "resolution must be a multiple of 8 and at least 8, not 20"),
        ({"resolution": 512, "further": (100,)}, "resolutions must be a multiple of 8 and at least 8, not 100"),
        ({"resolution": 512, "bucketing": "golden"}, "bucketing must be one of square, aspect, not 'golden'"),
        ({"resolution": 512, "bucketing": "aspect", "bucket_step": 20}, "bucket_step must be a multiple of 8"),
        ({"resolution": 512, "bucketing": "aspect", "max_aspect": 0.5}, "max_aspect must be at least 1"),
        ({"resolution": 512, "bucketing": "aspect", "max_aspect": math.nan}, "max_aspect must be at least 1"),
        ({"resolution": 512, "bucketing": "aspect", "bucket_step": 520}, "larger than the resolution 512, but is 520"),
    ],
)
def test_bad_sizes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Sizes(**values)


def test_resolutions_are_read_from_text():
    assert parsed_resolutions("") == parsed_resolutions(" , ") == () and parsed_resolutions("768, 1024,") == (768, 1024)
    for text in ("768 1024", "-8", "7e2", "big"):
        with pytest.raises(ValueError, match="resolutions takes pixels separated by commas"):
            parsed_resolutions(text)


def _bucket_of(batch):
    [bucket] = [bucket for bucket in BUCKETS if set(batch) <= set(bucket)]
    return BUCKETS.index(bucket)


def test_every_batch_is_of_one_bucket_and_every_epoch_has_all():
    order = draws.Order(BUCKETS, 2, seed=4)
    assert order.steps_per_epoch == 4 + 1 + 2
    schedules = []
    for epoch in range(6):
        schedule = [_bucket_of(order.batch(step)) for step in range(7 * epoch, 7 * epoch + 7)]
        assert Counter(schedule) == {0: 4, 1: 1, 2: 2}
        schedules.append(tuple(schedule))
    assert len(set(schedules)) > 1


def test_each_bucket_is_seamless_over_passes_and_epochs():
    streams, order = {0: [], 1: [], 2: []}, draws.Order(BUCKETS, 2, seed=4)
    for step in range(7 * 14):
        batch = order.batch(step)
        streams[_bucket_of(batch)] += batch
    passes = [streams[0][i : i + 7] for i in range(0, 7 * 16, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes) and len({tuple(one) for one in passes}) > 10
    assert all(sorted(streams[2][i : i + 4]) == [8, 8, 9, 9] for i in range(0, 56, 4))


def test_batches_are_a_function_of_their_arguments_alone():
    order, other = draws.Order(BUCKETS, 3, 1), draws.Order(BUCKETS, 3, 2)
    steps = [order.batch(step) for step in range(40)]
    assert [draws.Order(BUCKETS, 3, 1).batch(step) for step in range(40)] == steps
    assert order.batch(39) == steps[39] and order.batch(3) == steps[3]
    assert [other.batch(step) for step in range(40)] != steps


def test_permutations_are_drawn_once_a_pass(monkeypatch):
    buckets = tuple(tuple(range(100 * b, 100 * b + 100)) for b in range(3))
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda count, **options: drawn.append(count) or randperm(count, **options))
    order = draws.Order(buckets, 4, 0)
    for step in range(75 * 2):  # two epochs, two passes of each bucket
        order.batch(step)
    assert sorted(drawn) == [75] * 2 + [100] * 6


def test_empty_buckets_are_refused():
    with pytest.raises(ValueError, match=r"at least one item in each bucket.*\[1, 0\]"):
        draws.Order(((0,), ()), 1, 0)
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        draws.Order(((0,),), 0, 0)


def test_flips_and_dropouts_are_drawn_by_seed_and_step():
    flips = [flip for step in range(100) for flip in draws.flips(10, 3, step)]
    assert 420 < sum(flips) < 580 and flips[:10] == draws.flips(10, 3, 0) and flips[10:20] != flips[:10]
    dropped = [drop for step in range(100) for drop in draws.dropouts(10, 0.1, 3, step)]
    assert 60 < sum(dropped) < 150 and dropped[:10] == draws.dropouts(10, 0.1, 3, 0)
    assert not any(draws.dropouts(100, 0.0, 0, 0)) and all(draws.dropouts(100, 1.0, 0, 0))
    assert draws.dropouts(100, 0.5, 3, 0) != draws.flips(100, 3, 0)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            draws.dropouts(1, wrong, 0, 0)
