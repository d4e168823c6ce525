"""Our rings against the Rust crates ``virtio-queue`` and ``vm-memory``, over one shared memory.

Split rings only: the crate has no packed ones.  What is in a chain is told at the top of
``src/main.rs``; each side checks every byte of the other's.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guest_memory import GuestMemory
from virtqueue import (
    DeviceQueue,
    DriverQueue,
    EngineName,
    RingConfig,
    available_engines,
    ring_layout,
)

HERE = Path(__file__).parent
GUEST = 1 << 32
USER = 0x7F00_0000_0000
SIZE = 1 << 20
ROOM = 64
QUEUE = 256
CHAINS = int(os.environ.get("RUST_RINGS_CHAINS", "100000"))
PATIENCE = 60.0
XOR = bytes(byte ^ 0x5A for byte in range(256))

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def program() -> Path:
    cargo = shutil.which("cargo")
    if cargo is None or subprocess.run([cargo, "--version"], capture_output=True).returncode:
        pytest.skip("cargo is not installed")
    command = [cargo, "build", "--release", "--locked", "--quiet"]
    built = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    return HERE / "target" / "release" / "rust-rings"


def request_of(number: int) -> bytes:
    return number.to_bytes(8, "little") + bytes((number + k) & 255 for k in range(number % 57))


def answer_to(request: bytes) -> bytes:
    return request[:8] + request[8:].translate(XOR)


class Shared:
    """Memory with a ring at its beginning and room behind, and the two eventfds."""

    def __init__(self) -> None:
        self.memory, self.fd = GuestMemory.allocate(SIZE, GUEST, USER)
        self.kick, self.call = os.eventfd(0), os.eventfd(0)
        layout = ring_layout(QUEUE)
        self.places = [GUEST + place for place in layout[:3]]
        self.room = GUEST + -(-layout.size // 4096) * 4096

    @contextmanager
    def peer(self, program: Path, role: str, **options: int) -> Iterator[Any]:
        numbers = {"memory": self.fd, "kick": self.kick, "call": self.call, "size": SIZE}
        numbers |= dict(zip(("descriptors", "avail", "used"), self.places, strict=True))
        numbers |= {"room": self.room, "chains": CHAINS, "queue": QUEUE, **options}
        arguments = [f"--{name.replace('_', '-')}={int(n)}" for name, n in numbers.items()]
        with subprocess.Popen(
            [program, role, *arguments],
            pass_fds=(self.fd, self.kick, self.call),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
                out, error = process.communicate(timeout=PATIENCE)
                assert process.returncode == 0, error
                assert out.endswith(f"{numbers['chains']} chains\n")
            finally:
                process.kill()

    def config(self, places: list[int], size: int = QUEUE, event_idx: bool = False) -> RingConfig:
        table, avail, used = (place - GUEST + USER for place in places)
        return RingConfig(size, table, avail, used, event_idx=event_idx)

    def close(self) -> None:
        for fd in (self.fd, self.kick, self.call):
            os.close(fd)


@pytest.fixture
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.close()


def sleep(fd: int, process: Any) -> None:
    if not select.select([fd], [], [], PATIENCE)[0]:
        process.kill()
        raise AssertionError(f"a wake-up was lost: {process.communicate()[1]}")
    os.eventfd_read(fd)


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_their_device_serves_our_driver(
    program: Path, shared: Shared, event_idx: bool, indirect: bool
) -> None:
    share = 64 + 2 * ROOM
    tables = shared.room + QUEUE * share
    driver = DriverQueue(
        shared.config(shared.places, event_idx=event_idx),
        shared.memory,
        tables=tables,
        table_length=4,
    )
    window = shared.memory.window
    assert window is not None
    base = shared.memory.translate(shared.memory.regions[0].guest_address, SIZE, 3)
    offset = base - shared.memory.window_base
    idle = list(range(QUEUE))
    open_: dict[int, tuple[int, int]] = {}
    offered = done = 0
    with shared.peer(program, "device", event_idx=event_idx) as process:
        while done < CHAINS:
            for _ in range(1 + offered % QUEUE):
                if not idle or driver.free < 4 or offered == CHAINS:
                    break
                slot = idle.pop()
                source = shared.room + slot * share
                target = source + ROOM
                data = request_of(offered)
                place = source - GUEST + offset
                window[place : place + len(data)] = data
                window[place + ROOM : place + 2 * ROOM] = bytes(ROOM)
                # The first byte alone: what the device reads and writes lies in four pieces.
                readable = [(source, 1), (source + 1, len(data) - 1)]
                writable = [(target, 5), (target + 5, ROOM - 5)]
                head = driver.add(readable, writable, indirect)
                assert head not in open_
                open_[head] = offered, slot
                offered += 1
            if driver.publish():
                os.eventfd_write(shared.kick, 1)
            found = driver.collect()
            for head, written in found:
                number, slot = open_.pop(head)
                expected = answer_to(request_of(number))
                place = shared.room + slot * share + ROOM - GUEST + offset
                assert written == len(expected)
                assert window[place : place + written] == expected
                idle.append(slot)
            done += len(found)
            if not found and (offered == CHAINS or driver.free < 4 or not idle):
                if not driver.enable_notification():
                    sleep(shared.call, process)
                driver.disable_notification()
    assert not open_


def serve(device: DeviceQueue, shared: Shared, process: Any, chains: int) -> None:
    expected = served = 0
    while served < chains:
        batch = device.take()
        if not batch:
            sleep(shared.kick, process)
            continue
        for chain in batch:
            data = chain.read()
            assert data == request_of(expected), expected
            expected += 1
            chain.write(answer_to(data))
            device.complete(chain)
        served += len(batch)
        if device.publish():
            os.eventfd_write(shared.call, 1)


@pytest.mark.parametrize("engine", ["c", "python"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_our_device_serves_their_driver(
    program: Path, shared: Shared, engine: EngineName, event_idx: bool, indirect: bool
) -> None:
    if engine not in available_engines():
        pytest.skip("this installation has no C engine")
    config = shared.config(shared.places, event_idx=event_idx)
    with (
        DeviceQueue(config, shared.memory, engine=engine) as device,
        shared.peer(program, "driver", event_idx=event_idx, indirect=indirect) as process,
    ):
        serve(device, shared, process, CHAINS)


@pytest.mark.parametrize("engine", available_engines())
def test_our_device_serves_their_mock_driver(
    program: Path, shared: Shared, engine: EngineName
) -> None:
    with shared.peer(program, "mock", chains=8, queue=16) as process:
        places = [int(place) for place in process.stdout.readline().split()]
        with DeviceQueue(shared.config(places, 16), shared.memory, engine=engine) as device:
            sleep(shared.kick, process)
            serve(device, shared, process, 8)
            # The mock driver looks at the index only; it asked for no call.
            os.eventfd_write(shared.call, 1)
