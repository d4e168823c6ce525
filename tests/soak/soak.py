"""Hours of trouble for one back-end: does it stay right, and does it stay small?

    python tests/soak/soak.py --minutes 60 [--engine c|python] [--seed N]

A disk is served by a process of its own. Here a driver reads and writes blocks that carry sequence
numbers, and between the requests it does what front-ends and guests do and should not do: see
`TROUBLES`. Each answer is checked. Whenever nobody is connected, the back-end's memory, file
descriptors and mappings are measured; what grows fails the run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import vhost_protocol as vp
from guest_memory import GuestAddress, GuestMemoryError, allocate_memfd
from vhost_backend import BlockDevice, VhostBackendError, VirtioFeature
from vhost_backend.devices.blk import F_FLUSH, F_MQ
from vhost_backend.testing import BLOCK, BlockWorkload, DeviceProcess, DriverSession
from virtqueue import EngineName, VirtqueueError

BLOCKS = 256
#: A part of the disk for front-ends whose writes nobody checks.
SCRATCH = BLOCKS
SIZE = 2 * BLOCKS * BLOCK
QUEUES = 2
MEMORY = 4 << 20
#: What the back-end may grow by between the end of the warm-up and the end.
MOST_GROWTH_KIB = 8 << 10
MOST_MAPPINGS = 12
WARM_UP = 0.25
PATIENCE = 60.0


class Grown(Exception):
    """The back-end holds more than it should."""


class Usage(NamedTuple):
    """What the back-end's process holds."""

    resident_kib: int
    descriptors: int
    mappings: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Measure a process."""
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return cls(
            int(fields["VmRSS"].split()[0]),
            len(os.listdir(f"/proc/{pid}/fd")),
            Path(f"/proc/{pid}/maps").read_text().count("\n"),
            int(fields["Threads"]),
        )


class Soak:
    """One back-end and its troublesome driver."""

    def __init__(self, process: DeviceProcess, seed: int) -> None:
        self.process = process
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.session: DriverSession | None = None
        self.session = self._connect()
        self.work = BlockWorkload(self.session, blocks=BLOCKS, depth=16, seed=seed)
        self.lowest = self.quiet()

    def _connect(self, **options: Any) -> DriverSession:
        rng = self.rng
        return self.process.connect(
            **options,
            features=F_FLUSH | F_MQ,
            num_queues=rng.randint(1, QUEUES),
            queue_size=rng.choice((64, 128, 256)),
            packed=rng.random() < 0.5,
            event_idx=rng.random() < 0.5,
            inflight=rng.random() < 0.5,
            memory_size=MEMORY,
            protocol_features=vp.ProtocolFeatures.CONFIGURE_MEM_SLOTS
            | vp.ProtocolFeatures.STATUS
            | vp.ProtocolFeatures.LOG_SHMFD
            | vp.ProtocolFeatures.INFLIGHT_SHMFD,
        )

    def live(self) -> DriverSession:
        """The session, connected."""
        if self.session is None:
            self.session = self._connect()
            self.work.resume(
                self.session,
                indirect=self.rng.random() < 0.5,
                queue=self.rng.randrange(len(self.session.vrings)),
            )
        return self.session

    def hang_up(self) -> None:
        """Close the connection, whatever is in flight."""
        if self.session is not None:
            self.session.close()
            self.session = None

    # -- troubles -------------------------------------------------------------------------------

    def requests(self) -> None:
        """Ordinary work."""
        self.live()
        self.work.run(self.rng.randint(1, 200), PATIENCE)

    def disconnect(self) -> None:
        """Hang up in the middle of requests."""
        self.live()
        self.work.submit()
        self.hang_up()

    def stop_ring(self) -> None:
        """Stop and start the ring under requests."""
        session = self.live()
        self.work.submit()
        vring = self.work.queue
        base = session.stop_ring(vring)
        session.start_ring(vring, base)
        self.work.drain(PATIENCE)

    def disable_ring(self) -> None:
        """Disable and enable the ring under requests."""
        session = self.live()
        for _ in range(self.rng.randint(1, 10)):
            session.frontend.set_vring_enable(self.work.queue, False)
            self.work.submit()
            session.frontend.set_vring_enable(self.work.queue, True)
        self.work.drain(PATIENCE)

    def reset(self) -> None:
        """Reset the device, by one message or the other, and set the rings up again."""
        session = self.live()
        self.work.drain(PATIENCE)
        bases = [session.stop_ring(vring.index) for vring in session.vrings]
        if self.rng.random() < 0.5:
            session.frontend.reset_device()
        else:
            session.frontend.set_status(15)
            session.frontend.set_status(0)
        for index, base in enumerate(bases):
            session.start_ring(index, base)

    def many_regions(self) -> None:
        """Fill the memory table up to 509 regions under requests, and empty it again."""
        session = self.live()
        fd = allocate_memfd(4096)
        regions = [
            vp.MemoryRegion(index << 20, 4096, 0x1000_0000_0000 + (index << 20))
            for index in range(1, 509)
        ]
        for index, region in enumerate(regions):
            session.frontend.add_mem_reg(region, fd)
            if index % 100 == 0:
                self.work.run(8, PATIENCE)
        with contextlib.suppress(vp.RequestFailed):
            session.frontend.add_mem_reg(vp.MemoryRegion(600 << 20, 4096, 1 << 40), fd)
            raise SystemExit("the 510th region was taken")
        self.rng.shuffle(regions)
        for region in regions:
            session.frontend.rem_mem_reg(region)
        os.close(fd)
        self.work.drain(PATIENCE)

    def new_table(self) -> None:
        """Send the memory table anew, again and again, under requests."""
        session = self.live()
        for _ in range(10):
            self.work.submit()
            session.share_memory()
        self.work.drain(PATIENCE)

    def partial_message(self) -> None:
        """Vanish at any byte of a message, with or without descriptors on the way."""
        self.hang_up()
        conversation = b"".join(
            b"".join(number.to_bytes(4, "little") for number in (code, 1, len(payload))) + payload
            for code, payload in (
                (1, b""),
                (15, b""),
                (16, (1 << 3 | 1).to_bytes(8, "little")),
                (3, b""),
                (2, (1 << 30 | 1 << 32).to_bytes(8, "little")),
                (8, bytes(4) + (128).to_bytes(4, "little")),
                (14, (0).to_bytes(8, "little")),
            )
        )
        for _ in range(self.rng.randint(1, 8)):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(self.process.path)
                end = self.rng.randint(0, len(conversation))
                fds = [0] * self.rng.choice((0, 1, 3))
                with contextlib.suppress(OSError):
                    if end:
                        socket.send_fds(client, [conversation[:end]], fds)

    def garbage(self) -> None:
        """Send bytes that mean nothing."""
        self.hang_up()
        for _ in range(4):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(self.process.path)
                with contextlib.suppress(OSError):
                    client.sendall(self.rng.randbytes(self.rng.randint(1, 64)))

    def hostile_ring(self) -> None:
        """Write anything into a ring, and kick."""
        self.hang_up()
        with self._connect() as session:
            vring = session.vrings[0]
            size = vring.config.size
            for _ in range(self.rng.randint(1, 20)):
                area = self.rng.choice(
                    (vring.descriptor_area, vring.driver_area, vring.device_area)
                )
                place = area + self.rng.randrange(16 * size if area == vring.descriptor_area else 4)
                session.memory.write(GuestAddress(place), self.rng.randbytes(8))
                os.eventfd_write(vring.kick_fd, 1)
                if self.rng.random() < 0.3:
                    session.frontend.get_features()

    def killed_front_end(self) -> None:
        """A front-end's process dies in the middle of whatever it does."""
        self.hang_up()
        child = os.fork()
        if not child:
            try:
                with self._connect() as session:
                    work = BlockWorkload(session, blocks=BLOCKS, first=SCRATCH, depth=16)
                    while True:
                        work.submit()
                        with contextlib.suppress(Exception):
                            work.collect(1.0)
            finally:
                os._exit(0)
        time.sleep(self.rng.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def truncated(self) -> None:
        """Take memory, dirty log or in-flight records away under requests."""
        self.hang_up()
        what = self.rng.choice(("memory", "log", "inflight"))
        fd = os.memfd_create(what)
        os.ftruncate(fd, MEMORY)
        options = {"memory_fd": os.dup(fd)} if what == "memory" else {}
        with (
            # Nobody knows what the scratch blocks hold: wrong data is none there.
            contextlib.suppress(
                VhostBackendError, VirtqueueError, GuestMemoryError, vp.ProtocolError
            ),
            self._connect(**options) as session,
        ):
            if what == "log":
                session.frontend.set_log_base(MEMORY, 0, fd)
                session.frontend.set_features(int(session.features | VirtioFeature.LOG_ALL))
            elif what == "inflight":
                bases = [session.stop_ring(vring.index) for vring in session.vrings]
                size = session.vrings[0].config.size
                session.frontend.set_inflight_fd(1 << 17, 0, len(bases), size, fd)
                for index, base in enumerate(bases):
                    session.start_ring(index, base)
            work = BlockWorkload(session, blocks=BLOCKS, first=SCRATCH, depth=16)
            work.submit()
            os.ftruncate(fd, self.rng.choice((0, 4096)))
            work.submit()
            work.collect(0.2)
        os.close(fd)

    # -- figures --------------------------------------------------------------------------------

    def quiet(self) -> Usage:
        """Hang up and measure, once the back-end has let go of everything."""
        self.hang_up()
        assert self.process.pid is not None
        usage = Usage.of(self.process.pid)
        end = time.monotonic() + 10
        stable = 0
        while time.monotonic() < end and stable < 5:
            time.sleep(0.02)
            before, usage = usage, Usage.of(self.process.pid)
            stable = stable + 1 if before.descriptors == usage.descriptors else 0
        return usage

    def run(self, seconds: float) -> list[tuple[float, Usage]]:
        """Make trouble for that long; (seconds, usage) as it was measured."""
        start = time.monotonic()
        measured: list[tuple[float, Usage]] = []
        every = min(10.0, seconds / 20)
        troubles: list[Callable[[], None]] = [getattr(self, name) for name in TROUBLES]
        weights = list(TROUBLES.values())
        while (now := time.monotonic() - start) < seconds:
            if not measured or now - measured[-1][0] > every:
                measured.append((now, self.quiet()))
            (trouble,) = self.rng.choices(troubles, weights)
            try:
                trouble()
            except Exception as error:
                error.add_note(f"while {trouble.__name__}, after {now:.1f} s")
                raise
            self.counts[trouble.__name__] += 1
        self.live()
        self.work.verify(PATIENCE)
        measured.append((time.monotonic() - start, self.quiet()))
        return measured


#: What happens, and how often in proportion.
TROUBLES = {
    "requests": 40,
    "disconnect": 10,
    "stop_ring": 10,
    "disable_ring": 10,
    "reset": 5,
    "many_regions": 1,
    "new_table": 5,
    "partial_message": 8,
    "garbage": 4,
    "hostile_ring": 8,
    "killed_front_end": 4,
    "truncated": 4,
}


def check(measured: list[tuple[float, Usage]]) -> None:
    """Raise `Grown` for what grew after the warm-up."""
    warm = [usage for when, usage in measured if when >= WARM_UP * measured[-1][0]]
    first, last = warm[0], warm[-1]
    if last.descriptors > min(usage.descriptors for usage in warm):
        raise Grown(f"descriptors: {[usage.descriptors for usage in warm]}")
    if last.mappings > min(usage.mappings for usage in warm) + MOST_MAPPINGS:
        raise Grown(f"mappings: {[usage.mappings for usage in warm]}")
    if last.resident_kib > first.resident_kib + MOST_GROWTH_KIB:
        raise Grown(f"KiB: {[usage.resident_kib for usage in warm]}")
    # One thread comes and goes that says how many messages were left out.
    if last.threads > min(usage.threads for usage in warm) + 1:
        raise Grown(f"threads: {[usage.threads for usage in warm]}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The guest's faults are logged, as they should be: not what is looked for here.

    Whoever keeps the records, as pytest does, keeps what they tell of: memory, too.
    """
    logger = logging.getLogger("vhost_backend")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def soak(seconds: float, *, engine: EngineName | None = None, seed: int = 1) -> str:
    """Make trouble for `seconds`; a report. Raises what went wrong."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "disk.img")
        with open(image, "wb") as file:
            file.truncate(SIZE)
        with DeviceProcess(
            lambda: BlockDevice(image, num_queues=QUEUES), engine=engine, timeout=PATIENCE
        ) as process:
            run = Soak(process, seed)
            try:
                measured = run.run(seconds)
            finally:
                run.hang_up()
            process.terminate()
        check(measured)
        with open(image, "rb") as file:
            data = file.read()
        run.work.verify_image(lambda offset, length: data[offset : offset + length])
    warm = [usage for when, usage in measured if when >= WARM_UP * measured[-1][0]]
    lines = [f"{measured[-1][0]:.0f} s, {run.work.completed} requests checked"]
    lines.append(", ".join(f"{name} {count}" for name, count in sorted(run.counts.items())))
    for name in Usage._fields:
        values = [getattr(usage, name) for usage in warm]
        lines.append(f"{name}: {values[0]} after the warm-up, {values[-1]} at the end")
    return "\n".join(lines)


def main() -> int:
    """Run for `--minutes`; the last line is the verdict, and the status is 0 when it is good."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--engine", choices=("c", "python"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        print(soak(options.minutes * 60, engine=options.engine, seed=options.seed))
    except Grown as error:
        print(f"verdict: FAILED, the back-end has grown: {error}")
        return 1
    except KeyboardInterrupt:
        print("verdict: none, it was interrupted")
        return 1
    except BaseException as error:
        traceback.print_exc()
        place = ", ".join(getattr(error, "__notes__", ()))
        print(f"verdict: FAILED, {type(error).__name__}: {error} {place}".rstrip())
        return 1
    print("verdict: passed: nothing lost, nothing repeated, nothing has grown")
    return 0


if __name__ == "__main__":
    sys.exit(main())
