"""QEMU's virtio-net attaches to a device of two queues; `vhost-trace` between them finds no fault.

QEMU enables the rings when it makes the device, before any guest has negotiated features, so no
guest is needed to see it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.guest import Missing, in_ci, provide_program, skip_or_fail

from vhost_backend import QueueInfo, Request, VirtioDevice
from vhost_backend.testing import served

TRACE = "import sys; from vhost_protocol.trace.cli import main; sys.exit(main())"


class Pair(VirtioDevice):
    """A receive and a transmit queue on which nothing happens."""

    num_queues = 2

    def handle(self, queue: QueueInfo, request: Request) -> None:
        """Take what is sent."""


@pytest.fixture(scope="session")
def qemu() -> str:
    try:
        return provide_program("qemu-system-x86_64", "qemu-system-x86", fetch=in_ci())
    except Missing as reason:
        skip_or_fail(reason)


def test_virtio_net_attaches(qemu: str, tmp_path: Path) -> None:
    front = tmp_path / "front"
    messages: list[dict[str, Any]] = []
    with (
        served(Pair()) as path,
        subprocess.Popen(
            [sys.executable, "-c", TRACE, "--listen", front, "--connect", path, "--json", "--once"],
            stdout=subprocess.PIPE,
            text=True,
        ) as trace,
    ):
        assert trace.stdout is not None
        with subprocess.Popen(
            [
                *(qemu, "-machine", "q35,memory-backend=ram", "-m", "64", "-accel", "tcg", "-S"),
                *("-nodefaults", "-display", "none", "-qmp", "stdio"),
                *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
                *("-chardev", f"socket,id=front,path={front},reconnect=1"),
                *("-netdev", "vhost-user,id=net,chardev=front"),
                *("-device", "virtio-net-pci,netdev=net"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as running:
            assert running.stdin is not None
            try:
                for line in trace.stdout:
                    messages.append(json.loads(line))
                    if sum(m.get("request") == "SET_VRING_ENABLE" for m in messages) == 2:
                        break
                # The device is made: QEMU answers on its monitor, and was not hung up on.
                running.stdin.write('{"execute":"qmp_capabilities"}{"execute":"quit"}')
                running.stdin.flush()
                assert running.wait(60) == 0
            finally:
                running.kill()
        messages += map(json.loads, trace.stdout)
    requests = [m["request"] for m in messages if "request" in m and not m["reply"]]
    assert requests[-2:] == ["SET_VRING_ENABLE"] * 2
    assert "SET_FEATURES" not in requests
    assert [m for m in messages if m.get("violations")] == []
