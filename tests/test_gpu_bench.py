"""`make gpu`: that it runs in small, so that it cannot rot; that a failure costs one phase; what findings become."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfy_server import comfy_dir, comfy_python
from pretended_device import PretendedDevice
from safetensors.torch import load_file

from diff2flow_nodes.bench.gpu import results
from diff2flow_nodes.bench.gpu.findings import Findings, read_lines
from diff2flow_nodes.bench.gpu.pack import copy_comfyui, pinned
from diff2flow_nodes.bench.gpu.phases import PHASES
from diff2flow_nodes.bench.random_backbone import RandomBackbone, square_sizes
from diff2flow_nodes.bench.random_prior import build_random
from diff2flow_nodes.bench.tiny_unet import unet_config

ROOT = Path(__file__).resolve().parent.parent
NEEDS_A_CARD = {"waits", "compiled", "comfy_plain"}


def _in_small(out: Path, *words: str, **environment: str) -> list[dict]:
    """The lines of a run on the CPU."""
    command = [sys.executable, "-m", "diff2flow_nodes.bench.gpu", "--small", "--seconds", "900", "--out", str(out)]
    command += words
    without = {name: value for name, value in os.environ.items() if not name.startswith("COMFYUI_")}
    done = subprocess.run(command, capture_output=True, text=True, env={**without, **environment}, check=False)
    lines = read_lines(out / "findings.jsonl")
    assert done.returncode == 0, [line for line in lines if line["kind"] == "failed"] or done.stderr[-2000:]
    return lines


def test_every_phase_runs_in_small(tmp_path):
    """Those inside ComfyUI have a test of their own."""
    lines = _in_small(tmp_path)
    skipped = {line["phase"]: line["reason"] for line in lines if line["kind"] == "skipped"}
    assert set(skipped) == NEEDS_A_CARD | {"comfy"} and skipped["comfy"] == "COMFYUI_DIR is not set"
    assert [line["phase"] for line in lines if line["kind"] == "took"] == list(PHASES)
    assert {line["phase"] for line in lines if line["kind"] == "finding"} == set(PHASES) - set(skipped)


@pytest.mark.comfy
@pytest.mark.skipif(comfy_dir() is None, reason="needs the real ComfyUI: set COMFYUI_DIR")
def test_the_phase_inside_comfyui_runs_in_small(tmp_path):
    place = {"COMFYUI_DIR": str(comfy_dir()), "COMFYUI_PYTHON": str(comfy_python(comfy_dir()))}
    lines = [line for line in _in_small(tmp_path, "comfy", **place) if line["kind"] == "finding"]
    assert {line["preset"] for line in lines if "preset" in line} == {"light", "full"}
    ratios = [line["median_ratio"] for line in lines if line.get("of", "").startswith("sampling")]
    assert len(ratios) == 2 and all(set(each) == {"ours", "ksampler", "bare"} for each in ratios)


def test_what_fails_is_named_and_the_next_phase_goes_on(tmp_path):
    findings = Findings(tmp_path / "found.jsonl", 60.0)
    findings.phase("first", lambda: findings.case("a case", lambda: {"value": 1 / 0}, batch=4))
    findings.phase("second", lambda: findings.case("another", lambda: {"value": 0.123456789}))
    failed, _, found, _ = read_lines(tmp_path / "found.jsonl")
    assert (failed["phase"], failed["what"]) == ("first", "a case") and failed["error"].startswith("ZeroDivisionError")
    assert failed["where"][-1].startswith("test_gpu_bench.py:")
    assert found["value"] == 0.12346 and findings.failed == ["a case"]


def test_what_the_time_does_not_suffice_for_is_named(tmp_path):
    findings = Findings(tmp_path / "found.jsonl", 0.0)
    findings.phase("late", lambda: pytest.fail("it has run"))
    assert findings.skipped == ["late"]
    (tmp_path / "found.jsonl").open("a").write('{"at": 1.0, "kind": "fin')
    assert [line["kind"] for line in read_lines(tmp_path / "found.jsonl")] == ["skipped"]


def test_a_checkpoint_is_made_on_a_device(tmp_path):
    """In full size that takes a minute on a CPU."""
    with PretendedDevice() as pretended:
        path = build_random(tmp_path / "made.safetensors", text_layers=1, width=32, device=pretended.device)
    assert all(torch.isfinite(value.float()).all() for value in load_file(path).values())


@pytest.mark.parametrize("family", ["SD1", "SDXL"])
def test_a_network_takes_its_inputs_to_its_own_device(family):
    """torch's meta device stands for a card: it refuses what is on the CPU, and computes nothing."""
    config = unet_config(2 if family == "SDXL" else 1, 1, family, width=32)
    backbone = RandomBackbone(config, torch.device("meta"), torch.float16)
    given = backbone.conditioning(*backbone.texts(2), square_sizes(2, 64))
    output = backbone(torch.zeros(2, 4, 8, 8), torch.zeros(2), given)
    assert output.device.type == "meta" and output.shape == (2, 4, 8, 8)
    with pytest.raises(RuntimeError):
        backbone.module(torch.zeros(2, 4, 8, 8).half(), torch.zeros(2), given["context"].half())


# A card that nobody has: every number is made up.
_STEP = {"side": 512, "checkpointing": False, "precision": "bf16", "optimizer": "adamw", "compile": False}
_MADE_UP = [
    {"phase": "environment", "kind": "finding", "torch": "2.11.0", "card": "NVIDIA Imaginary 9000"},
    {"phase": "steps_sd15", "kind": "finding", "family": "SD1.5", "preset": "light", "batch": 4, **_STEP,
     "ours_seconds": 0.24, "ratio": 1.021, "peak_bytes": 5 * 2**30, "peak_over_estimate": 0.95},
    {"phase": "steps_sd15", "kind": "finding", "family": "SD1.5", "preset": "light", "batch": 1, **_STEP,
     "estimate_bytes": 4 * 2**30},
    {"phase": "pairs", "kind": "finding", "family": "SD1.5", "side": 512, "steps": 10, "batch": 64,
     "pairs_a_minute": 400.0, "share_of_bare_throughput": 0.97},
    {"phase": "cards", "kind": "finding", "family": "SDXL", "card_gib": 8, "fits": False, "said": "this run needs more",
     **_STEP, "preset": "light", "batch": 1},
    {"phase": "images", "kind": "failed", "what": "images", "error": "RuntimeError: no", "where": []},
    {"phase": "steps_sdxl", "kind": "skipped", "what": "steps_sdxl", "reason": "the time is used up"},
    {"phase": "comfy", "kind": "skipped", "what": "comfy", "reason": "the time is used up"},
]  # fmt: skip
_SECOND_RUN = [
    {"phase": "environment", "kind": "finding", "torch": "2.11.0", "card": "NVIDIA Imaginary 9000"},
    {"phase": "comfy", "kind": "finding", "of": "sampling", "median_ratio": {"ksampler": 1.0, "ours": 1.01}},
]


def _files(folder: Path, *runs: list[dict]) -> list[Path]:
    paths = [folder / f"{i}.jsonl" for i in range(len(runs))]
    for path, lines in zip(paths, runs, strict=True):
        path.write_text("".join(json.dumps({"at": 1.0, **line}) + "\n" for line in lines))
    return paths


def test_findings_become_a_result_and_the_pages_tables(tmp_path):
    page = tmp_path / "settings.md"
    page.write_text(f"# Before\n\n{results.BEGIN}\nold numbers: 99 s\n{results.END}\n\n# After\n")
    given = [*map(str, _files(tmp_path, _MADE_UP, _SECOND_RUN)), "--results", str(tmp_path), "--page", str(page)]
    assert results.main(given, say=lambda text: None) == 0
    kept = json.loads((tmp_path / "gpu_nvidia_imaginary_9000.json").read_text())
    assert [line["what"] for line in kept["skipped"]] == ["steps_sdxl"]  # comfy came in the second run
    text = page.read_text()
    assert text.startswith("# Before") and text.endswith("# After\n") and "old numbers" not in text
    for row in (
        "| SD1.5 | 512 | light | 4 | off | bf16 | 0.24 | 1.02 | 5 | 0.95 |",
        "| SD1.5, 512 px, a style: 750 steps of *light*, batch 4 | 3 min | extrapolated from 0.24 s a step, measured |",
        "| SD1.5, 512 px, pairs of 10 teacher steps, 64 a call | 400 pairs a minute | measured |",
        "| SD1.5, 512 px, 10,000 pairs of 40 teacher steps | 1.67 h |"
        " extrapolated from 400 pairs a minute of 10 teacher steps, measured |",
        "| 8 GB | SDXL, 512 px, light, batch 1 | off | does not fit: this run needs more |",
        "| sampling in ComfyUI over KSampler (dynamic VRAM) | 1.01 |",
    ):
        assert row in text
    assert "Failed: images. Not measured: steps_sdxl." in text
    assert "| light | 1 |" not in text and "*light*, batch 1" not in text  # of which there is an estimate alone


def test_without_a_card_every_time_is_called_unmeasured(tmp_path):
    page = results.written((ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), [])
    part = page.partition(results.BEGIN)[2].partition(results.END)[0]
    assert "all times are unmeasured" in part and "|" not in part
    small = _files(tmp_path, [{"phase": "environment", "kind": "finding", "torch": "2.11.0"}])
    with pytest.raises(ValueError, match="of one card, and are of none"):
        results.card_result(small)


def test_the_page_is_what_the_results_make_of_it():
    cards = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("gpu_*.json"))]
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert results.written(page, cards) == page


def test_comfyui_travels_without_what_a_process_does_not_need(tmp_path):
    checkout = tmp_path / "checkout"
    wanted = ("main.py", "comfy/ldm/models/a.py", "comfy/sd1_tokenizer/vocab.json")
    left = (".git/config", "web/index.html", "models/checkpoints/a.safetensors", "comfy/t5_tokenizer/t.json")
    for name in (*wanted, *left):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    (checkout / "requirements.txt").write_text("torch\ncomfy-aimdo==0.4.13\nnumpy>=1.25 # a comment ==\n")
    copy_comfyui(checkout, tmp_path / "copy")
    found = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert found == {*wanted, "requirements.txt"}
    assert pinned(checkout / "requirements.txt") == {"comfy-aimdo": "comfy-aimdo==0.4.13"}
