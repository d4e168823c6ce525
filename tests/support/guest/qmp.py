"""QMP, as much of it as driving a guest takes."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any


class QmpError(Exception):
    """QEMU refused a command.

    `command` is its name, `error_class` and `description` are QEMU's own words.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {error_class}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class Qmp:
    """The control channel of a QEMU over a connected socket, which it owns from now on."""

    def __init__(self, connection: socket.socket, *, limit: float = 30) -> None:
        self._socket = connection
        self._socket.settimeout(limit)
        self._buffer = b""
        self._lock = threading.Lock()
        self.events: list[dict[str, Any]] = []
        self._greeted = False

    def execute(self, command: str, /, *, limit: float = 30, **arguments: Any) -> Any:
        """Run a command and return its value; underscores in argument names become hyphens.

        Raises QmpError when QEMU refuses it, TimeoutError, and ConnectionError when QEMU is gone.
        """
        with self._lock:
            if not self._greeted:
                self._greeted = True
                self._receive(limit)
                self._execute("qmp_capabilities", {}, limit)
            hyphened = {name.replace("_", "-"): value for name, value in arguments.items()}
            return self._execute(command, hyphened, limit)

    def wait_event(self, name: str, *, limit: float = 30, **data: Any) -> dict[str, Any]:
        """Wait for an event whose data holds `data`; takes it, and those before it stay kept."""
        deadline = time.monotonic() + limit
        with self._lock:
            seen = 0
            while True:
                for event in self.events[seen:]:
                    held = event.get("data", {})
                    if event["event"] == name and all(held.get(k) == v for k, v in data.items()):
                        self.events.remove(event)
                        return event
                seen = len(self.events)
                message = self._receive(max(deadline - time.monotonic(), 0.01))
                self.events.append(message)

    def close(self) -> None:
        self._socket.close()

    def _execute(self, command: str, arguments: dict[str, Any], limit: float) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + limit
        while True:
            message = self._receive(max(deadline - time.monotonic(), 0.01))
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                error = message["error"]
                raise QmpError(command, error["class"], error["desc"])
            else:
                return message["return"]

    def _receive(self, limit: float) -> dict[str, Any]:
        self._socket.settimeout(limit)
        while b"\n" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("QEMU has closed its control channel")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
