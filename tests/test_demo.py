"""The demo: what it tells the templates, and its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import save_file

from diff2flow_nodes.bench import demo
from diff2flow_nodes.bench.demo_picture import Row, compose
from diff2flow_nodes.bench.templates import api_graph
from diff2flow_nodes.bench.templates.declared import declared


@pytest.mark.parametrize(("template", "changes"), [("finetune_and_sample", demo.GOLDEN), ("reflow", demo.STRAIGHT)])
def test_it_speaks_of_nodes_and_inputs_that_there_are(template: str, changes: demo.Changes) -> None:
    nodes = {entry["_meta"]["title"]: entry["class_type"] for entry in api_graph(template).values()}
    for title, inputs in changes.items():
        assert set(inputs) <= {entry.name for entry in declared(nodes[title]).widgets}


def test_the_picture_shows_both_rows_and_the_plots(tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 8)}, str(lora), metadata={"ss_network_dim": "2"})
    plot = Image.new("RGB", (300, 200), "navy")
    rows = [Row(colour, ["as it is"], Image.new("RGB", (340, 270), colour)) for colour in ("red", "lime")]
    for plots in ([plot], [plot, plot]):
        picture = Image.open(compose("Title", rows, plots, lora, tmp_path / "demo.png"))
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
        assert {ImageColor.getrgb(name) for name in ("red", "lime", "navy")} <= colours
    with pytest.raises(ValueError, match="3 plots beside 2 rows"):
        compose("Title", rows, [plot] * 3, lora, tmp_path / "no.png")
