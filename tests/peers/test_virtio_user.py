"""DPDK's virtio-user drives a device that is written with our package: an echo for every frame.

testpmd sends a few bursts and forwards what comes back, so that the same frames go round for as
long as both ends agree about both rings. It is no relative of ours, polls its rings, and sends
messages that QEMU never does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.guest import Missing, Served, in_ci, provide_program, skip_or_fail
from tests.support.guest.devices import echo_net
from tests.support.guest.processes import Child

RING = 256
FRAME = 64  # bytes, as testpmd makes them
BURST = 32  # testpmd's own; two of them are sent first
ENOUGH = 20 * 2 * BURST
LIMIT = 60.0  # seconds without progress: two polling processes may share one processor


class Seen(NamedTuple):
    """What testpmd has counted on its port."""

    received: int
    received_bytes: int
    sent: int
    sent_bytes: int


class Testpmd:
    """testpmd with one virtio-user port, run by commands; its output goes to `log`."""

    __test__ = False
    _STATISTICS = re.compile(
        r"RX-packets: (\d+)\s+RX-missed: \d+\s+RX-bytes:\s+(\d+)\n.*\n.*\n"
        r"\s+TX-packets: (\d+)\s+TX-errors: 0\s+TX-bytes:\s+(\d+)"
    )

    def __init__(self, program: str, log: Path, port: str) -> None:
        self.log = log
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        command = [
            *("stdbuf", "-oL"),  # or the end of what it says stays in its buffer
            program,
            f"--lcores=0@({cpus}),1@({cpus})",
            # Ordinary memory in a memfd; no files and sockets for other DPDK processes.
            *("--no-huge", "-m", "128", "--no-pci", "--no-shconf", "--no-telemetry"),
            f"--vdev=net_virtio_user0,{port},queues=1,queue_size={RING}",
            *("--", "--interactive", "--total-num-mbufs=2048", f"--burst={BURST}"),
        ]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True
            )

    def __enter__(self) -> Testpmd:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def tell(self, *commands: str) -> None:
        """Give it commands; it runs them in order and in its own time."""
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{command}\n" for command in commands))
        self._process.stdin.flush()

    def await_said(self, words: str) -> None:
        """Wait until its output has these words."""
        deadline = time.monotonic() + LIMIT
        while words not in self.log.read_text():
            self._check(deadline, repr(words))
            time.sleep(0.02)

    def seen(self) -> Seen:
        """Its counts now."""
        before = len(self._STATISTICS.findall(self.log.read_text()))
        self.tell("show port stats 0")
        deadline = time.monotonic() + LIMIT
        while len(found := self._STATISTICS.findall(self.log.read_text())) == before:
            self._check(deadline, "counts")
            time.sleep(0.02)
        return Seen(*map(int, found[-1]))

    def await_received(self, count: int) -> None:
        """Wait until it has received so many frames; each that arrives prolongs the wait."""
        now = self.seen().received
        deadline = time.monotonic() + LIMIT
        while now < count:
            self._check(deadline, f"{count} frames, {now} so far")
            last, now = now, self.seen().received
            if now != last:
                deadline = time.monotonic() + LIMIT
            time.sleep(0.02)

    def quit(self) -> None:
        """End it and wait for the end."""
        self.tell("stop", "quit")
        status = self._process.wait(LIMIT)
        said = self.log.read_text()
        assert (status, "ailed" in said) == (0, False), said

    def _check(self, deadline: float, wanted: str) -> None:
        assert self._process.poll() is None, f"it has ended\n{self.log.read_text()}"
        assert time.monotonic() < deadline, f"no {wanted}\n{self.log.read_text()}"


@pytest.fixture(scope="session")
def program() -> str:
    try:
        return provide_program("dpdk-testpmd", "dpdk-dev", "librte-net-virtio23", fetch=in_ci())
    except Missing as reason:
        skip_or_fail(reason)


@pytest.fixture(params=["c", "python"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Both ring engines."""
    return {"VIRTQUEUE_ENGINE": str(request.param)}


@pytest.fixture(params=["", ",packed_vq=1"], ids=["split", "packed"])
def ring(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(echo_net.__file__), *arguments]


@pytest.fixture
def device(environment: dict[str, str], tmp_path: Path) -> Iterator[Served]:
    with Served("echo-net", command("SOCKET"), tmp_path, environment=environment) as served:
        yield served


def compare(device_said: str, seen: Seen, stops: int = 1, inherited: int = 0) -> None:
    """Every frame is counted at both ends, but for those in a ring when it was stopped.

    `inherited` is how many may have been in a ring when the device began.
    """
    *complaints, last = device_said.splitlines()
    assert complaints == []
    counts = json.loads(last)
    assert counts["too_long"] == 0
    assert -inherited <= seen.sent - counts["received"] <= stops * RING
    assert -inherited <= counts["echoed"] - seen.received <= stops * RING
    for frames, length in (
        (counts["received"], counts["received_bytes"]),
        (counts["echoed"], counts["echoed_bytes"]),
        (seen.sent, seen.sent_bytes),
        (seen.received, seen.received_bytes),
    ):
        assert length == frames * FRAME


def test_frames_go_round(program: str, device: Served, ring: str, tmp_path: Path) -> None:
    """Two runs on one connection: between them both rings are stopped and started again."""
    with Testpmd(program, tmp_path / "testpmd.log", f"path={device.socket}{ring}") as testpmd:
        testpmd.tell("start tx_first 2")
        testpmd.await_received(ENOUGH)
        testpmd.tell("stop", "port stop 0", "port start 0", "start tx_first 2")
        testpmd.await_received(2 * ENOUGH)
        testpmd.tell("stop")
        seen = testpmd.seen()
        testpmd.quit()
    assert device.stop() == 0
    compare(device.tail(), seen, stops=2)


def test_the_device_connects_to_it(
    program: str, environment: dict[str, str], ring: str, tmp_path: Path
) -> None:
    """virtio-user listens, as OVS and containers have it; a second device follows one that died."""
    with (
        tempfile.TemporaryDirectory(prefix="vub-") as folder,
        Testpmd(program, tmp_path / "testpmd.log", f"path={folder}/s,server=1{ring}") as testpmd,
    ):

        def connect(name: str) -> Child:
            arguments = command(f"{folder}/s", "--connect")
            return Child(arguments, tmp_path / name, environment=os.environ | environment)

        with contextlib.closing(connect("first.log")) as first:
            testpmd.tell("start tx_first 2")
            testpmd.await_received(ENOUGH)
            first.kill()
        testpmd.tell("stop")
        before = testpmd.seen()
        with contextlib.closing(connect("second.log")) as second:
            testpmd.await_said("reconnection succeeds")
            testpmd.tell("start tx_first 2")
            testpmd.await_received(before.received + ENOUGH)
            testpmd.tell("stop")
            after = testpmd.seen()
            testpmd.quit()
            assert second.terminate() == 0
        seen = Seen(*(new - old for new, old in zip(after, before, strict=True)))
        compare(second.tail(), seen, inherited=RING)
