"""Rings through granted memory: block requests, with both engines.

The driver's side writes to its own pages; the device's side knows nothing but the grants. The
ring's three parts lie in three grants that are mapped at once, buffers and indirect tables in
grants that are mapped on demand.
"""

import ctypes
import mmap
import os
import random
import struct
import time
from functools import partial
from typing import Any, NamedTuple

from guest_memory import GuestAddress, GuestMemory
from vhost_xen import GrantMapError
from virtqueue import (
    Chain,
    DeviceQueue,
    DriverQueue,
    EngineName,
    Need,
    RingConfig,
    available_engines,
)

from .areas import (
    Area,
    Granter,
    KeepingMapper,
    drivers_memory,
    guest_granter,
    own_granter,
    regions_of,
)
from .libxen import PAGE
from .maps import mapped, nothing_left
from .report import check

GNTDEV = "/dev/xen/gntdev"
SECTOR = 512
IN, OUT = 0, 1
OK, IO_ERROR = 0, 1
HEADER = struct.Struct("<IIQ")
SIZE = 32
BUFFER_PAGES = 40


class Provider:
    """Maps what a queue needs, and lets a request fail whose pages cannot be mapped.

    Such a request gets zeroes of our own to work on, so that the ring goes on, and is known by
    the addresses in `failed`.
    """

    def __init__(self, queue: DeviceQueue, mapper: KeepingMapper) -> None:
        self._queue = queue
        self._mapper = mapper
        self.failed: list[tuple[int, int]] = []
        self.provided = 0

    def provide(self, need: Need) -> None:
        """Answer one Need."""
        region, mapping = self._mapper.find(need.address)
        offset = need.address - region.guest_address
        start = offset & -PAGE
        length = min(-(-(offset + need.length) & -PAGE), region.size) - start
        address = region.guest_address + start
        try:
            host, token = mapping.pin(address, length, need.access)
        except GrantMapError:
            self.failed.append((address, length))
            zeroes = mmap.mmap(-1, length)
            host = ctypes.addressof(ctypes.c_char.from_buffer(zeroes))
            given = self._queue.provide(address, length, need.access, host, lambda: zeroes)
        else:
            release = partial(mapping.unpin, token)
            given = self._queue.provide(address, length, need.access, host, release)
        assert given
        self.provided += 1

    def usable(self, chain: Chain) -> bool:
        """Whether all pages of a request could be mapped."""
        return not any(
            segment.guest < start + length and start < segment.guest + segment.length
            for segment in chain.segments
            for start, length in self.failed
        )


class Wanted(NamedTuple):
    """A request that the driver waits for: addresses, and what it writes to the disk."""

    data: int
    length: int
    status: int
    sector: int
    content: bytes | None


class Setup(NamedTuple):
    """Both sides of one ring."""

    driver: DriverQueue
    device: DeviceQueue
    provider: Provider
    drivers: GuestMemory
    buffers: Area
    disk: bytearray


def set_up(
    granter: Granter, buffers: Area, parts: list[Area], engine: EngineName, packed: bool, fd: int
) -> Setup:
    """A ring over fresh pages, seen from both sides."""
    for area in (*parts, buffers):
        ctypes.memset(area.host, 0, area.pages * PAGE)
    drivers = drivers_memory([*parts, buffers])
    descriptors, available, used = (part.user_address for part in parts)
    config = RingConfig(
        SIZE,
        descriptors,
        available,
        used,
        packed=packed,
        event_idx=True,
        status_byte=True,
    )
    tables = GuestAddress(buffers.guest_address + (buffers.pages - 8) * PAGE)
    driver = DriverQueue(config, drivers, tables=tables)
    mapper = KeepingMapper()
    table = [(region, fd) for region in regions_of(parts, [buffers], granter.domid)]
    device = DeviceQueue(config, GuestMemory.map(table, mapper=mapper), engine=engine)
    assert device.engine == engine
    return Setup(driver, device, Provider(device, mapper), drivers, buffers, bytearray(1 << 20))


def serve(setup: Setup) -> tuple[int, int]:
    """Be the disk until the ring is empty; (requests, those that failed)."""
    queue, provider, disk = setup.device, setup.provider, setup.disk
    requests = failures = 0
    while True:
        try:
            batch = queue.take()
        except Need as need:
            provider.provide(need)
            continue
        if not batch:
            return requests, failures
        for chain in batch:
            requests += 1
            if not provider.usable(chain):
                failures += 1
                queue.complete(chain, 0, IO_ERROR)
                continue
            kind, _, sector = HEADER.unpack(chain.read(HEADER.size))
            place = sector * SECTOR
            if kind == OUT:
                data = chain.read()
                disk[place : place + len(data)] = data
                queue.complete(chain, 1, OK)
            else:
                assert kind == IN
                length = chain.writable_length - 1
                chain.write(disk[place : place + length])
                queue.complete(chain, length + 1, OK)
        queue.publish()
        # What no request uses any more is unmapped now.
        queue.reclaim()


def exercise(setup: Setup, seed: int) -> int:
    """Write and read sectors, across pages and with indirect tables, and compare."""
    rng = random.Random(seed)
    driver, memory = setup.driver, setup.drivers
    room = setup.buffers.pages - 8
    model = bytearray(len(setup.disk))
    requests = 0
    for _ in range(4):
        wanted: dict[int, Wanted] = {}
        # Each request has four pages of its own, so that its pieces lie in any place of them.
        for slot in range(room // 4):
            base = setup.buffers.guest_address + slot * 4 * PAGE
            length = SECTOR * rng.randint(1, 14)
            sector = rng.randrange(0, len(model) // SECTOR - 14)
            kind = rng.choice((IN, OUT))
            header, status = base + rng.randrange(0, 64, 4), base + 4 * PAGE - 1
            data = base + rng.randint(80, 4 * PAGE - 2 - length)
            memory.write(GuestAddress(header), HEADER.pack(kind, 0, sector))
            memory.write(GuestAddress(status), b"\xff")
            cut = rng.randint(1, length - 1)
            pieces = [(data, cut), (data + cut, length - cut)]
            if kind == OUT:
                content = rng.randbytes(length)
                memory.write(GuestAddress(data), content)
                readable, writable = [(header, 16), *pieces], [(status, 1)]
            else:
                content = None
                readable, writable = [(header, 16)], [*pieces, (status, 1)]
            indirect = rng.random() < 0.5 or driver.free < 4
            head = driver.add(readable, writable, indirect=indirect)
            wanted[head] = Wanted(data, length, status, sector, content)
            if content is not None:
                # Requests of one round may overlap on the disk: one at a time, then.
                driver.publish()
                assert serve(setup) == (len(wanted), 0)
                requests += _verify(setup, wanted, model)
        driver.publish()
        assert serve(setup) == (len(wanted), 0)
        requests += _verify(setup, wanted, model)
    assert setup.disk == model
    return requests


def _verify(setup: Setup, wanted: dict[int, Wanted], model: bytearray) -> int:
    done = setup.driver.collect()
    assert {head for head, _ in done} == set(wanted)
    for head, written in done:
        data, length, status, sector, content = wanted[head]
        assert setup.drivers.read(GuestAddress(status), 1) == bytes((OK,))
        place = sector * SECTOR
        if content is None:
            assert written == length + 1
            assert setup.drivers.read(GuestAddress(data), length) == model[place : place + length]
        else:
            assert written == 1
            model[place : place + length] = content
    wanted.clear()
    return len(done)


def _run(granter: Granter, seed: int) -> dict[str, Any]:
    parts = [granter.area(1) for _ in range(3)]
    buffers = granter.area(BUFFER_PAGES)
    figures: dict[str, Any] = {}
    assert available_engines() == ("c", "python")
    for engine in available_engines():
        for packed in (False, True):
            fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
            with nothing_left():
                setup = set_up(granter, buffers, parts, engine, packed, fd)
                started = time.monotonic()
                requests = exercise(setup, seed)
                seconds = time.monotonic() - started
                # Between requests nothing but the ring's own three pages is mapped.
                assert len(mapped(GNTDEV)) == 3
                setup.device.close()
                name = f"{engine}_{'packed' if packed else 'split'}"
                figures[name] = {"requests": requests, "seconds": round(seconds, 3)}
                del setup
            os.close(fd)
    return figures


@check
def own_grants() -> dict[str, Any]:
    """Rings in pages that the dom0 grants to itself (gntalloc)."""
    with own_granter() as granter:
        return _run(granter, 1)


@check
def guest_grants() -> dict[str, Any]:
    """Rings in pages that a guest grants."""
    with guest_granter() as granter:
        return _run(granter, 2)


@check
def one_request_fails_alone() -> None:
    """A request with a page that was never granted fails; those before and after it do not."""
    with guest_granter() as granter:
        parts = [granter.area(1) for _ in range(3)]
        buffers = granter.area(BUFFER_PAGES)
        granter.revoke(buffers.reference + 5)
        for engine in available_engines():
            fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
            with nothing_left():
                setup = set_up(granter, buffers, parts, engine, False, fd)
                statuses = []
                for slot in range(3):
                    base = buffers.guest_address + slot * 4 * PAGE
                    setup.drivers.write(
                        GuestAddress(base), HEADER.pack(OUT, 0, slot) + b"\xff" * 16
                    )
                    statuses.append(base + 3 * PAGE)
                    # The second request's data is in the page that is missing.
                    data = [(base + PAGE, SECTOR)]
                    setup.driver.add([(base, 16), *data], [(statuses[-1], 1)])
                setup.driver.publish()
                assert serve(setup) == (3, 1)
                assert [written for _, written in setup.driver.collect()] == [1, 0, 1]
                assert [setup.drivers.read(GuestAddress(status), 1)[0] for status in statuses] == [
                    0,
                    1,
                    0,
                ]
                assert setup.device.broken is None
                setup.device.close()
                del setup
            os.close(fd)
