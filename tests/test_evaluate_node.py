"""Diff2Flow Evaluate: its numbers are the functions', its errors name it."""

import pytest
import torch

from diff2flow_nodes import hosts
from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.hosts.headless.host import HeadlessHost
from diff2flow_nodes.metrics.features import INCEPTION_FILE, pixel_features
from diff2flow_nodes.metrics.frechet import frechet_distance
from diff2flow_nodes.metrics.kernel import kernel_distance
from diff2flow_nodes.nodes import NODE_CLASS_MAPPINGS


@pytest.fixture
def node(tmp_path):
    before = list(hosts._chosen)
    hosts.use(HeadlessHost(tmp_path / "models", tmp_path / "input", tmp_path / "output"))
    yield NODE_CLASS_MAPPINGS["Diff2FlowEvaluate"]()
    hosts._chosen[:] = before


def test_the_numbers_are_those_of_the_functions(node):
    samples, reference = torch.rand(12, 16, 16, 3), torch.rand(9, 24, 32, 3) * 0.5
    report, frechet, kernel, precision, recall, *_ = node.evaluate(samples, reference, "pixels")
    one, two = pixel_features(samples), pixel_features(reference)
    assert frechet == frechet_distance(one, two) and kernel == kernel_distance(one, two)
    assert 0 <= precision <= 1 and 0 <= recall <= 1
    assert "12 images against 9 by pixels (48 features)" in report and f"{frechet:.4g}" in report
    assert "no more images than features" in report


def test_the_same_images_are_at_no_distance(node):
    pictures = torch.rand(60, 8, 8, 3)
    report, frechet, _, precision, recall, *_ = node.evaluate(pictures, pictures, "pixels", 2)
    assert frechet == pytest.approx(0, abs=1e-6) and (precision, recall) == (1.0, 1.0)
    assert "no more images" not in report


def test_worse_images_are_farther(node):
    real = torch.rand(40, 8, 8, 3)
    near, far = ((real + amount * torch.randn(40, 1, 1, 3)).clamp(0, 1) for amount in (0.02, 0.5))
    found = [node.evaluate(each, real, "pixels") for each in (near, far)]
    assert found[0][1] < found[1][1] and found[0][2] < found[1][2] and found[0][3] > found[1][3]


def test_errors_name_the_node_and_the_way_out(node):
    pictures = torch.rand(3, 8, 8, 3)
    for samples, features in ((pictures, "pixels"), (pictures[:1], "inception")):
        words = f"Diff2Flow Evaluate: .* not {len(samples)} in samples and 3 in reference; give more images"
        with pytest.raises(HostError, match=words):
            node.evaluate(samples, pictures, features)
    with pytest.raises(HostError, match=f"Diff2Flow Evaluate: .*{INCEPTION_FILE}"):
        node.evaluate(pictures, pictures, "inception", 2)
