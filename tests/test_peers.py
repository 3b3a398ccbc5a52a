"""Side by side with other trainers: what a process answers, who is left out, and what is over what."""

from __future__ import annotations

import sys

import pytest

from diff2flow_nodes.bench.peers import __main__ as peers

TRAINS = """
import torch
from diff2flow_nodes.bench.peers.worker import serve

def way(steps):
    print("what a trainer prints")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    for _ in range(steps):
        weight.square().sum().backward()
        optimizer.step()
    if steps > 4:
        raise OSError("too many")

serve(way, version="1.2")
"""


def _peer(code: str, tmp_path) -> peers.Peer:
    return peers.Peer([sys.executable, "-c", code], {}, tmp_path / "errors.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read as Linux tells it")
def test_a_process_trains_when_it_is_asked_to(tmp_path):
    peer = _peer(TRAINS, tmp_path)
    try:
        assert peer.about["version"] == "1.2"
        peer.round(2)
        assert len(peer.seconds) == len(peer.peaks) == 1 and 0.0 < peer.seconds[0] < 5.0 and peer.peaks[0] >= 0
        with pytest.raises(ValueError, match="OSError: too many"):
            peer.round(3)
    finally:
        peer.end()
    assert "what a trainer prints" in (tmp_path / "errors.txt").read_text()


def test_a_peer_that_cannot_run_says_why(tmp_path):
    with pytest.raises(ValueError, match="its process ended: .*No module named 'sd_scripts'"):
        _peer("import sd_scripts", tmp_path)


class _Fake:
    def __init__(self, fails_at: int = -1) -> None:
        self.seconds, self._fails_at = [], fails_at

    def round(self, steps: int) -> None:
        if len(self.seconds) == self._fails_at:
            raise ValueError("it broke")
        self.seconds.append(1.0)


def test_who_fails_is_left_out_and_the_others_go_on():
    fakes = {"bare": _Fake(), "kohya": _Fake(fails_at=1)}
    assert peers.measured(fakes, rounds=3, steps=2) == {"kohya": "it broke"}
    assert (len(fakes["bare"].seconds), len(fakes["kohya"].seconds)) == (4, 1)


def test_without_a_folder_a_peer_is_not_started(tmp_path):
    given = peers._parsed(["--comfyui", str(tmp_path)])
    assert set(peers.commands(given, tmp_path)) == {"bare", "ours", "bare_comfyui", "train_lora_node"}
    command, place = peers.commands(given, tmp_path / "c.safetensors")["train_lora_node"]
    assert command[-1].endswith("c.safetensors") and place == {"COMFYUI_DIR": str(tmp_path)}


def test_each_is_set_beside_the_bare_step_of_its_own_network_round_by_round():
    found = {
        "bare": ([9.0, 1.0, 2.0, 1.0], [500, 100, 100, 100]),
        "ours": ([9.0, 1.1, 2.2, 1.0], [900, 120, 110, 110]),
        "bare_comfyui": ([9.0, 2.0, 2.0, 2.0], [1, 200, 200, 200]),
        "train_lora_node": ([9.0, 10.0, 8.0, 12.0], [1, 300, 300, 300]),
    }
    result = peers.summary(found)
    assert result["ours"]["over_bare"] == pytest.approx(1.1) and result["ours"]["peak_over_bare"] == pytest.approx(1.1)
    assert result["train_lora_node"]["over_bare"] == 5.0 and result["train_lora_node"]["peak_over_bare"] == 1.5
