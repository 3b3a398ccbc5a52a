"""The memory table of docs/settings.md: what the memory check says of networks that take no memory."""

from __future__ import annotations

import pytest

from diff2flow_nodes.bench.memory_table import Backbone, Case, line, reckoned
from diff2flow_nodes.bench.tiny_unet import unet_config
from diff2flow_nodes.training.memory import Estimate

SMALL = unet_config(2, 1, "SD1", width=32)


def _reckoned(config=SMALL, **changes) -> Estimate:
    return reckoned(Case(**{"family": "SD1.5", "preset": "light", "side": 256, "batch": 1, **changes}), config)


def test_it_is_the_frozen_network_the_trained_layers_and_what_is_kept():
    found, more = _reckoned(), _reckoned(batch=4)
    assert found.frozen == 2 * Backbone(SMALL).parameters
    assert found.trained == more.trained > 0
    assert found.activations < more.activations < 4 * found.activations  # the weights in bf16 are kept once


def test_checkpointing_and_the_checkpoints_own_precision_need_less():
    found = _reckoned(batch=4)
    assert _reckoned(batch=4, checkpointing=True).activations < 0.5 * found.activations
    assert _reckoned(batch=4, precision="fp16").activations < found.activations


def test_preset_full_counts_its_originals_and_every_weight():
    count = Backbone(SMALL).parameters
    found = _reckoned(preset="full")
    assert (found.frozen, found.trained) == (2 * count, 16 * count)


def test_depth_widens_the_first_layer():
    plain, depth = (_reckoned(preset="paper-small", depth=seen) for seen in (False, True))
    assert depth.trained - plain.trained == 16 * 4 * 32 * 9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sdxl_in_half_precision_is_traced(precision):
    """bf16 products over fp16 weights: autocast refuses to join two fp16 tensors, such as SDXL's text and sizes."""
    config = unet_config(2, 1, "SDXL", width=32)
    assert _reckoned(config, family="SDXL", precision=precision).activations > 0


def test_a_line_names_the_case_and_its_gibibytes():
    case = Case("SDXL", "light", 1024, 2, True)
    shown = line(case, Estimate(5 * 2**30, 2**29, 2**30))
    assert shown == "| SDXL | 1024 | light | 2 | on | bf16 | 5.0 | 0.5 | 1.0 | 6.5 |"
