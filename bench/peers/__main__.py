"""A training step of ours beside other trainers', on the CPU: seconds and memory over the bare peft step.

    python -m diff2flow_nodes.bench.peers --kohya DIR --diffusers-examples DIR --comfyui DIR > peers.json

Whoever runs it fetches the peers: a checkout of kohya-ss/sd-scripts, the folder examples/text_to_image of
huggingface/diffusers, a checkout of ComfyUI. A peer without a folder is left out and named. Each has a process of its
own, under `--NAME-python` where it needs another python; they take turns, a few steps each. All train LoRA layers of
rank 8 on the linear and convolution layers of a slim SD1.5, a batch of four items with a caption each, in float32 on
one thread. Seconds are the CPU's, from one optimizer step to the next; memory is the peak of the process over what it
held before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..costs import machine
from ..random_prior import build_random

_PACKAGE = __package__ or ""
_BASES = {"train_lora_node": "bare_comfyui"}
"""The bare step that a way is set beside, where it is not "bare": on the same network."""
_ABOUT = {
    "batch": 4, "captions": "all different", "rank": 8, "layers": "linear and convolution", "latent": 16,
    "network": "SD1.5 of one level with one block, 26 M random weights",
}  # fmt: skip


class Peer:
    """A trainer in a process of its own.

    Args:
        command: starts it.
        environment: beside this process's own.
        errors: file that it complains in.

    Attributes:
        about: what it says of itself.
        seconds: a step, of each round.
        peaks: bytes, of each round.

    Raises:
        ValueError: it does not start.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], errors: Path) -> None:
        given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._errors, self._told = errors, open(errors, "w", encoding="utf-8")  # noqa: SIM115  (closed by `end`)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._told}
        self._process = subprocess.Popen(command, env=given, text=True, **pipes)
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.about = self._answer()

    def round(self, steps: int) -> None:
        """Trains so many timed steps."""
        self._process.stdin.write(f"steps {steps}\n")
        self._process.stdin.flush()
        found = self._answer()
        self.seconds.append(statistics.median(found["seconds"]))
        self.peaks.append(found["peak"])

    def end(self) -> None:
        """Ends its process."""
        self._process.stdin.close()
        self._process.wait()
        self._told.close()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if "error" in found:
                    raise ValueError(found["error"])
                return found
        said = " ".join(self._errors.read_text(encoding="utf-8", errors="replace").split())
        raise ValueError(f"its process ended: {said[-300:]}")


def commands(given: argparse.Namespace, checkpoint: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """How each way is started, and its environment; of the peers only those that have a folder."""
    here = [sys.executable, "-m"]
    found = {name: ([*here, f"{_PACKAGE}.headless", name], {}) for name in ("bare", "ours")}
    if given.diffusers_examples:
        python = [given.diffusers_python, "-m"]
        found["diffusers"] = ([*python, f"{_PACKAGE}.diffusers_loop", str(given.diffusers_examples)], {})
    if given.kohya:
        found["kohya"] = ([given.kohya_python, "-m", f"{_PACKAGE}.kohya", str(given.kohya)], _path(given.kohya_path))
    if given.comfyui:
        script = [given.comfyui_python, str(Path(__file__).with_name("comfyui.py"))]
        place = {"COMFYUI_DIR": str(given.comfyui)}
        for name, way in (("bare_comfyui", "bare"), ("train_lora_node", "train_lora_node")):
            found[name] = ([*script, way, str(checkpoint)], place)
    return found


def _path(first: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, (first, os.environ.get("PYTHONPATH"))))} if first else {}


def measured(peers: dict[str, Peer], rounds: int, steps: int) -> dict[str, str]:
    """All of them in turns, one round more than counts; whoever fails is left out from then on: why, by name."""
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        for name in [name for name in peers if name not in failed]:
            try:
                peers[name].round(steps)
            except (ValueError, OSError) as error:
                failed[name] = str(error)
            print(f"round {number} of {rounds}: {name}", file=sys.stderr)
    return failed


def summary(found: Mapping[str, tuple[Sequence[float], Sequence[int]]]) -> dict[str, Any]:
    """Medians over the rounds but the first one, and what is over the bare step in the same round.

    Args:
        found: seconds a step and peak bytes of each round, by way.
    """
    result = {}
    for name, (seconds, peaks) in found.items():
        base_seconds, base_peaks = found[_BASES.get(name, "bare")]
        ratios = [mine / bare for mine, bare in zip(seconds[1:], base_seconds[1:], strict=True)]
        result[name] = {
            "median_seconds_a_step": statistics.median(seconds[1:]),
            "over_bare": statistics.median(ratios),
            "over_bare_of_each_round": ratios,
            "median_peak_bytes": statistics.median(peaks[1:]),
            "peak_over_bare": statistics.median(peaks[1:]) / statistics.median(base_peaks[1:]),
        }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what was measured, as JSON."""
    given = _parsed(arguments)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = build_random(folder / "slim.safetensors") if given.comfyui else folder
        peers, failed = {}, {}
        for way, (command, environment) in commands(given, checkpoint).items():
            try:
                peers[way] = Peer(command, environment, folder / f"{way}.txt")
                stack.callback(peers[way].end)
            except (ValueError, OSError) as error:
                failed[way] = str(error)
        failed |= measured(peers, given.rounds, given.steps)
        kept = {way: (peer.seconds, peer.peaks) for way, peer in peers.items() if way not in failed}
        about = {**machine(), "threads": 1, "cores": os.cpu_count(), "python": platform.python_version(), **_ABOUT}
        versions = {way: peer.about["torch"] for way, peer in peers.items()}
    missing = [peer for peer in ("kohya", "diffusers_examples", "comfyui") if not getattr(given, peer)]
    about |= {
        "torch_of_each": versions,
        "load_average": os.getloadavg()[1],
        "rounds": given.rounds,
        "steps_a_round": given.steps,
        "peers": given.versions,
    }
    print(json.dumps({**about, "left_out": missing, "failed": failed, "ways": summary(kept)}, indent=2))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="diff2flow_nodes.bench.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--diffusers-examples", type=Path, help="examples/text_to_image of huggingface/diffusers")
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI")
    for name in ("kohya", "diffusers", "comfyui"):
        parser.add_argument(f"--{name}-python", default=sys.executable, help="that runs it (this one)")
    parser.add_argument("--kohya-path", default="", help="before its PYTHONPATH: sd-scripts asks for old libraries")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="timed ones of each way in a round")
    parser.add_argument("--versions", default="", help="of the peers, for the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
