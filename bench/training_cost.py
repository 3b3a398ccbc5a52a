"""What a training step costs over the bare forward, backward and AdamW, in ComfyUI: ours and core's TrainLoraNode.

    COMFYUI_DIR=path/to/ComfyUI path/to/its/python bench/training_cost.py CHECKPOINT [ROUNDS] > cost.json
    ... --only memory --add-to cost.json > both.json   # in parts

Time: in one process, the ways take turns, a few steps each; a step lasts from the end of one optimizer step to the end
of the next, so it holds all that a run repeats. Memory: each way in a process of its own, its peak over what the
process holds when the model is loaded and the captions are encoded. With `--device cuda` on a GPU, by its own clock,
as ComfyUI's main.py starts there: with dynamic VRAM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training_ways import BATCH, DEFAULTS, EQUAL, RANK, Material, bare, has_bypass, ours, step_clock, theirs  # noqa: E402

# isort: split
import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy_process import DEVICE, arguments, dynamic_vram  # noqa: E402
from costs import interleaved, machine, medians, peak_bytes, ratios, restarted_peak  # noqa: E402

Way = Callable[[Material, int], None]
PROCESSES = 2
"""For each way whose memory is measured."""
WAYS: dict[str, Way] = {
    "bare": bare,
    "ours": ours,
    "train_lora_node": lambda material, steps: theirs(material, steps, EQUAL),
    "train_lora_node_defaults": lambda material, steps: theirs(material, steps, DEFAULTS),
}
if has_bypass():
    WAYS["train_lora_node_bypass"] = lambda material, steps: theirs(material, steps, {**EQUAL, "bypass_mode": True})
MAIN = ("bare", "ours", "train_lora_node")
OTHERS = tuple(name for name in WAYS if name not in MAIN)


def time_of(names: Sequence[str], given: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Seconds a step of some ways, and their ratios. TrainLoraNode gets a model of its own: it may leave traces."""
    models = {is_theirs: Material.of(given.checkpoint, given.side) for is_theirs in (False, True)}

    def timed(name: str) -> Callable[[], float]:
        material = models[name.startswith("train_lora_node")]

        def run() -> float:
            with step_clock() as clock:
                WAYS[name](material, given.steps + 1)
            return clock.seconds()

        return run

    seconds = interleaved({name: timed(name) for name in names}, rounds, warm_up=rounds > 1)
    found = {"rounds": rounds, "steps_a_round": given.steps, "median_seconds_a_step": medians(seconds)}
    return {**found, **{f"over_{base}": ratios(seconds, base) for base in ("bare", "ours") if base in names}}


def speed(given: argparse.Namespace) -> dict[str, Any]:
    """The three ways, all in float32 and without checkpointing."""
    return time_of(MAIN, given, given.rounds)


def others(given: argparse.Namespace) -> dict[str, Any]:
    """TrainLoraNode's other ways, once."""
    return time_of(("bare", *OTHERS), given, 1)


def memory(given: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of each way over the loaded model: the medians of processes of their own, and ratios to bare."""
    peaks: dict[str, list[int]] = {name: [] for name in MAIN}
    for _ in range(PROCESSES):
        for name, found in peaks.items():
            options = ["--peak", name, "--side", str(given.side), "--steps", str(given.steps), "--device", DEVICE]
            options += ["--disable-dynamic-vram"] if given.disable_dynamic_vram else []
            command = [sys.executable, __file__, str(given.checkpoint), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1])["peak"])
    middle = {name: statistics.median(found) for name, found in peaks.items()}
    over = {name: peak / middle["bare"] for name, peak in middle.items()}
    return {"processes": PROCESSES, "peak_bytes": peaks, "median_peak_bytes": middle, "over_bare": over}


def peak(given: argparse.Namespace) -> int:
    """Peak bytes of a way in this process, over what it holds before."""
    import peft  # noqa: F401  (its own size is no part of any way)

    material = Material.of(given.checkpoint, given.side)
    if DEVICE == "cuda":  # where a model stays on the CPU until it is used
        comfy.model_management.load_models_gpu([material.model])
    before = restarted_peak(DEVICE == "cuda")
    WAYS[given.peak](material, given.steps + 1)
    return peak_bytes(DEVICE == "cuda") - before


def _version() -> str:
    from comfyui_version import __version__

    return __version__


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("rounds", type=int, nargs="?", default=8)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each way in a round")
    parser.add_argument("--side", type=int, default=16, help="of the latents")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--disable-dynamic-vram", action="store_true", help="as ComfyUI has it")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="measure these parts")
    parser.add_argument("--add-to", type=Path, help="results of other parts, taken over")
    parser.add_argument("--peak", choices=tuple(WAYS), help="only the peak memory of one way")
    return parser.parse_args(arguments)


PARTS = {"speed": speed, "others": others, "memory": memory}


def main() -> None:
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    given = _parsed()
    if given.peak:
        print(json.dumps({"peak": peak(given)}))
        return
    known = json.loads(given.add_to.read_text()) if given.add_to else {}
    about = {"comfyui": _version(), "commit": _commit(), "device": DEVICE, "dynamic_vram": dynamic_vram(), **machine()}
    about |= {"batch": BATCH, "captions": "all different", "rank": RANK, "latent": given.side}
    found = {name: part(given) for name, part in PARTS.items() if name in given.only}
    print(json.dumps({**known, **about, **found}, indent=2))


if __name__ == "__main__":
    main()
