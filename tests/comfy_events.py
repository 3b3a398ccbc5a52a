"""What ComfyUI's websocket sends, without a websocket library: text messages of one client, kept as they come."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

_SECONDS = 300


class Events:
    """Listens as a client; `prompts` are to be queued under the same `client_id`. Use as a context manager."""

    def __init__(self, port: int, client_id: str = "tests") -> None:
        self.client_id, self._port = client_id, port
        self._heard: list[dict[str, Any]] = []

    def __enter__(self) -> Events:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET /ws?clientId={self.client_id} HTTP/1.1", f"Host: 127.0.0.1:{self._port}", "Upgrade: websocket",
                 "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]  # fmt: skip
        self._socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        self._stream = self._socket.makefile("rb")
        assert b"101" in self._stream.readline()
        while self._stream.readline().strip():
            pass
        self._socket.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Data of the messages of a type so far."""
        return [message["data"] for message in list(self._heard) if message.get("type") == kind]

    def wait_for(self, kind: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first message of that type that meets the condition."""
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            for data in self.of(kind):
                if condition(data):
                    return data
            time.sleep(0.02)
        raise AssertionError(f"no such {kind} came; heard: {self._heard[-5:]}")

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError, struct.error):
            while True:
                opcode, payload = self._frame()
                if opcode == 1:
                    self._heard.append(json.loads(payload))

    def _frame(self) -> tuple[int, bytes]:
        first, second = struct.unpack("!BB", self._stream.read(2))
        size = second & 0x7F
        if size >= 126:
            size = struct.unpack("!H", self._stream.read(2))[0] if size == 126 else self._long()
        return first & 0x0F, self._stream.read(size)

    def _long(self) -> int:
        return struct.unpack("!Q", self._stream.read(8))[0]
