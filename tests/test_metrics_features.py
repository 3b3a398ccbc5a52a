"""Kernel distance, precision, recall and features against numpy, scipy and, where it is installed, torchmetrics."""

import sys

import numpy
import pytest
import torch

from diff2flow_nodes.metrics.coverage import precision_recall
from diff2flow_nodes.metrics.evaluation import evaluated
from diff2flow_nodes.metrics.features import INCEPTION_FILE, inception_features, pixel_features
from diff2flow_nodes.metrics.frechet import frechet_distance
from diff2flow_nodes.metrics.kernel import kernel_distance
from diff2flow_nodes.metrics.text_fit import clip_score


def _sets(first=60, second=45, width=7, shift=0.4):
    random = torch.Generator().manual_seed(1)
    turn = torch.randn(width, width, generator=random, dtype=torch.float64)
    one = torch.randn(first, width, generator=random, dtype=torch.float64) @ turn
    return one, torch.randn(second, width, generator=random, dtype=torch.float64) + shift


def _kernel_by_loops(one, two):
    """The sums written out, pair by pair."""

    def k(x, y):
        return (float(numpy.dot(x, y)) / len(x) + 1.0) ** 3

    def within(points):
        pairs = [k(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j]
        return sum(pairs) / len(pairs)

    between = [k(x, y) for x in one for y in two]
    return within(one) + within(two) - 2 * sum(between) / len(between)


def test_the_kernel_distance_is_its_sums():
    one, two = _sets()
    assert kernel_distance(one, two) == pytest.approx(_kernel_by_loops(one.numpy(), two.numpy()), rel=1e-10)
    assert kernel_distance(one.float(), two.float()) == pytest.approx(kernel_distance(one, two), rel=1e-4)


def test_the_kernel_distance_is_not_biased():
    """Two halves of one distribution are at 0 on average, whatever their number."""
    found = []
    for seed in range(40):
        drawn = torch.randn(24, 5, generator=torch.Generator().manual_seed(seed))
        found.append(kernel_distance(drawn[:12], drawn[12:]))
    assert abs(numpy.mean(found)) < 3 * numpy.std(found) / len(found) ** 0.5


def test_the_frechet_distance_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    one, two = (x.numpy() for x in _sets())
    means, covariances = [x.mean(0) for x in (one, two)], [numpy.cov(x, rowvar=False) for x in (one, two)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + numpy.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(torch.from_numpy(one), torch.from_numpy(two)) == pytest.approx(expected, rel=1e-8)


class _Identity(torch.nn.Module):
    """Features as torchmetrics wants an extractor."""

    num_features = 7

    def forward(self, x):
        return x


def test_torchmetrics_finds_the_same():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    one, two = _sets(50, 50)
    theirs = FrechetInceptionDistance(_Identity(), input_img_size=(7,)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(_Identity(), subsets=1, subset_size=50)
    for metric in (theirs, kernel):
        metric.update(one, real=True)
        metric.update(two, real=False)
    assert frechet_distance(one, two) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert kernel_distance(one, two) == pytest.approx(float(kernel.compute()[0]), rel=1e-6)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_loops(neighbours):
    distance = pytest.importorskip("scipy.spatial.distance")
    one, two = _sets(shift=1.0)

    def share(points, among):
        reach = numpy.sort(distance.cdist(among, among), axis=1)[:, neighbours]
        return (distance.cdist(points, among) <= reach).any(axis=1).mean()

    expected = share(one.numpy(), two.numpy()), share(two.numpy(), one.numpy())
    assert precision_recall(one, two, neighbours) == pytest.approx(expected)


def test_precision_and_recall_at_their_ends():
    points = torch.randn(20, 3)
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100.0) == (0.0, 0.0)
    few = points[:1].repeat(20, 1) + 1e-3 * torch.randn(20, 3)
    precision, recall = precision_recall(few, points)
    assert precision == 1.0 and recall < 0.2


def test_sets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="more than so many images in both sets, not 3 in samples and 20 in reference"):
        precision_recall(torch.ones(3, 2), torch.ones(20, 2))
    with pytest.raises(ValueError, match="equal features"):
        kernel_distance(torch.ones(5, 2), torch.ones(5, 3))
    with pytest.raises(ValueError, match="the second set has features that are not finite"):
        kernel_distance(torch.ones(5, 2), torch.full((5, 2), float("nan")))


def test_pixels_are_mean_colours():
    picture = torch.rand(2, 16, 8, 3)
    found = pixel_features(picture).reshape(2, 3, 4, 4)
    expected = picture.numpy().reshape(2, 4, 4, 4, 2, 3).mean(axis=(2, 4))
    torch.testing.assert_close(found, torch.from_numpy(expected).movedim(-1, 1))
    with pytest.raises(ValueError, match=r"images must be \(N, height, width, 3\), not \(16, 8, 3\)"):
        pixel_features(picture[0])


def test_missing_weights_and_packages_are_named(tmp_path, monkeypatch):
    pictures, weights = torch.rand(4, 8, 8, 3), tmp_path / "metrics" / INCEPTION_FILE
    with pytest.raises(ValueError, match=f"put {INCEPTION_FILE}.* into the folder models/metrics, or choose"):
        evaluated(pictures, pictures, "inception", weights)
    weights.parent.mkdir()
    weights.touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        inception_features(pictures, weights)
    with pytest.raises(ValueError, match="features must be one of pixels, inception, not 'words'"):
        evaluated(pictures, pictures, "words", weights)


def test_the_clip_score_says_what_it_lacks(tmp_path, monkeypatch):
    pictures = torch.rand(2, 8, 8, 3)
    with pytest.raises(ValueError, match="2 images need as many captions, not 1"):
        clip_score(pictures, ["a fox"], tmp_path)
    with pytest.raises(ValueError, match="no CLIP model in"):
        clip_score(pictures, ["a fox", "a cat"], tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchmetrics"):
        clip_score(pictures, ["a fox", "a cat"], tmp_path)
