"""The tracer between the embedded driver and the daemon: three packages that agree on the rules."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from vhost_backend import BlockDevice
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import BlockDriver, DriverSession, served


def test_a_disk_that_is_used_through_the_tracer(tmp_path: Path) -> None:
    """Descriptors pass, nothing breaks a rule, and every kind of message of a session is seen."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with (
        served(BlockDevice(image, num_queues=2)) as back,
        tempfile.TemporaryDirectory(prefix="vhost-") as folder,
    ):
        front = f"{folder}/s"
        command = [sys.executable, "-c", "from vhost_protocol.trace.cli import main; main()"]
        command += ["--listen", front, "--connect", back, "--json", "--once"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tracer:
            try:
                with DriverSession.connect(
                    front, features=DRIVER_FEATURES, num_queues=2, inflight=True
                ) as session:
                    for queue in range(2):
                        driver = BlockDriver(session, queue=queue)
                        driver.write(queue * 4096, b"x" * 4096)
                        assert driver.read(queue * 4096, 4096) == b"x" * 4096
                    assert session.stop_ring(0) == 2
                said, _ = tracer.communicate(timeout=60)
            finally:
                tracer.send_signal(signal.SIGKILL)
    messages = [line for line in map(json.loads, said.splitlines()) if "request" in line]
    seen = {message["request"] for message in messages}
    assert {"SET_MEM_TABLE", "SET_VRING_KICK", "SET_INFLIGHT_FD", "GET_VRING_BASE"} <= seen
    assert [message for message in messages if message["violations"]] == []
    assert image.read_bytes()[:8192] == b"x" * 8192
