"""A real ComfyUI server on CPU for the tests: started from COMFYUI_DIR, in a base directory of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parent.parent
_START_SECONDS, _PROMPT_SECONDS = 180, 600
_UNFINISHED = (0, 3, 64)
"""The last ComfyUI that was seen with Vue nodes as an experiment."""


def comfy_dir() -> Path | None:
    """The ComfyUI checkout to test in, None without COMFYUI_DIR."""
    value = os.environ.get("COMFYUI_DIR")
    return Path(value) if value else None


def comfy_python(directory: Path) -> Path:
    """COMFYUI_PYTHON, else the python of a virtual environment in the checkout."""
    chosen = os.environ.get("COMFYUI_PYTHON")
    candidates = [Path(chosen)] if chosen else [directory / v / "bin" / "python" for v in (".venv", "venv")]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"no python for ComfyUI in {candidates}; set COMFYUI_PYTHON")


def make_base(base: Path) -> Path:
    """A base directory as ComfyUI wants it, with the pack among its custom nodes."""
    for name in ("custom_nodes", "models/checkpoints", "models/loras", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "diff2flow_nodes"
    if not link.exists():
        link.symlink_to(PACK)
    return base


class ComfyServer:
    """Starts ComfyUI and queues prompts over HTTP. Use as a context manager."""

    def __init__(self, directory: Path, base: Path) -> None:
        self.directory, self.base, self.port = directory, make_base(base), _free_port()
        self.log = base / "server.log"

    def __enter__(self) -> ComfyServer:
        command = [comfy_python(self.directory), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-auto-launch", "--preview-method", "latent2rgb"]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=subprocess.STDOUT)
        self._wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def has_vue_nodes(self) -> bool:
        """Whether Vue nodes are finished: as an experiment they show no pack's widgets, no text fields, other sizes."""
        version = self.get("/system_stats")["system"]["comfyui_version"]
        return tuple(map(int, version.split("."))) > _UNFINISHED

    def get(self, path: str) -> Any:
        """JSON of a GET request."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, data: dict[str, Any]) -> Any:
        """JSON of a POST request; the body of an error answer is returned like any other."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode())
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return json.loads(body) if body else {}

    def memory(self, peak: bool = False) -> float:
        """Resident memory of the server, MB: now, or the most that it has been."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024

    def queue(self, prompt: dict[str, Any], client_id: str = "") -> str:
        """Queues an API-format prompt and returns its id."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex})
        if "prompt_id" not in answer:
            raise AssertionError(f"ComfyUI refused the prompt: {json.dumps(answer)[:2000]}")
        return answer["prompt_id"]

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """History entry of a prompt once it has ended, well or not."""
        deadline = time.monotonic() + _PROMPT_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            if self._process.poll() is not None:
                raise AssertionError(f"ComfyUI ended:\n{self.tail()}")
            time.sleep(0.2)
        raise AssertionError(f"the prompt did not end in {_PROMPT_SECONDS} s:\n{self.tail()}")

    def run(self, prompt: dict[str, Any], client_id: str = "") -> dict[str, list[Path]]:
        """Image files by node id; AssertionError with ComfyUI's message if the prompt failed."""
        return {node: self.files(out) for node, out in self.outputs(prompt, client_id).items()}

    def outputs(self, prompt: dict[str, Any], client_id: str = "") -> dict[str, dict[str, Any]]:
        """What each node shows on the page, by node id; AssertionError as for `run`."""
        entry = self.wait(self.queue(prompt, client_id))
        failure = failure_of(entry)
        if failure:
            raise AssertionError(f"{failure['node_type']}: {failure['exception_message']}\n{self.tail()}")
        return entry["outputs"]

    def files(self, output: dict[str, Any]) -> list[Path]:
        """Image files among what a node shows."""
        images = output.get("images", ())
        return [self.base / i["type"] / i.get("subfolder", "") / i["filename"] for i in images]

    def tail(self, characters: int = 4000) -> str:
        """The end of the server's log."""
        return self.log.read_text(errors="replace")[-characters:]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                self.get("/system_stats")
                return
            except OSError:
                if self._process.poll() is not None:
                    raise AssertionError(f"ComfyUI did not start:\n{self.tail()}") from None
                time.sleep(0.5)
        raise AssertionError(f"ComfyUI did not answer in {_START_SECONDS} s:\n{self.tail()}")


def failure_of(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The execution error (or interruption) in a history entry, None if it went well."""
    for kind, message in entry["status"]["messages"]:
        if kind in ("execution_error", "execution_interrupted"):
            return {"kind": kind, "exception_message": "", **message}
    return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
