"""Guest memory that is truncated under us does not end the process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
import ctypes, os, signal, sys
sys.path.insert(0, {folder!r})
from guest_memory import GuestMemory, MmapMapper, Region
from virtqueue import QueueBroken, Reason
from virtqueue.memory.sigbus_guard import SigbusGuard
from virtqueue_rig import GUEST, USER, Rig

def lossy(**settings):
    fd = os.memfd_create("lossy")  # not sealed, as a front-end's need not be
    os.ftruncate(fd, 1 << 20)
    regions = [(Region(GUEST, 1 << 20, USER), fd)]
    rig = Rig(memory=GuestMemory.map(regions, mapper=MmapMapper(guarded=True)), **settings)
    rig.fd = fd
    return rig

def host(rig, offset):
    return rig.memory.translate(GUEST + offset, 1, 3)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    script = PRELUDE.format(folder=str(Path(__file__).parent)) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )


def check(body: str) -> None:
    done = run(body)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("fine\n")


def test_without_the_guard_the_process_dies() -> None:
    done = run(
        """
        rig = lossy()
        os.ftruncate(rig.fd, 0)
        ctypes.c_uint8.from_address(host(rig, 0)).value
        """
    )
    assert done.returncode == -7


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_chain_in_lost_memory_is_not_published(engine: str, packed: bool) -> None:
    check(
        f"""
        assert SigbusGuard.install() and not SigbusGuard.install()
        rig = lossy(engine={engine!r}, packed={packed})
        SigbusGuard.watch(rig.memory)
        rig.next = GUEST + (1 << 19)
        rig.offer_many(2)
        chain, other = rig.device.take()
        os.ftruncate(rig.fd, 1 << 19)
        chain.write(b"lost")
        assert SigbusGuard.events() == 1
        rig.device.complete(chain)
        rig.device.complete(other)
        rig.device.publish()
        assert rig.driver.collect() == []
        assert rig.device.broken.reason is Reason.TRUNCATED
        assert rig.device.in_flight == 0
        print("fine")
        """
    )


RECORDS = """
from guest_memory import DirtyLog, SharedMapping
from virtqueue import InflightRegion, inflight_size

def watched(mapping):
    SigbusGuard.watch_range(*mapping.pages, mapping.page_size, mapping.poison_address)
    return mapping

def records(size, engine, packed, what):
    \"""A ring over memory that stays, whose log or in-flight region may go.\"""
    fd = os.memfd_create("records")
    os.ftruncate(fd, 1 << 18)
    rig = Rig(size=size, engine=engine, packed=packed, device=False)
    if what == "log":
        rig.log = DirtyLog(fd, 1 << 18, enabled=True, guarded=True)
        watched(rig.log.mapping)
        rig.device = rig.new_device(log=rig.log)
    else:
        mapping = watched(SharedMapping(fd, inflight_size(size, packed), guarded=True))
        rig.inflight = InflightRegion(
            mapping.address, mapping.size, mapping, poison=mapping.poison_address
        )
        rig.device = rig.new_device()
    rig.records = fd
    return rig

def serve(rig):
    for chain in rig.device.take():
        chain.write(b"good")
        rig.device.complete(chain)
    rig.device.publish()
    return len(rig.driver.collect())
"""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("engine", ["c", "python"])
@pytest.mark.parametrize("what", ["log", "inflight"])
@pytest.mark.parametrize("size", [8, 1024])
def test_records_that_are_truncated_break_the_queue(
    what: str, engine: str, packed: bool, size: int
) -> None:
    check(
        RECORDS
        + f"""
SigbusGuard.install()
rig = records({size}, {engine!r}, {packed}, {what!r})
rig.offer_many(2)
assert serve(rig) == 2
rig.offer_many(2)
batch = rig.device.take()
assert len(batch) == 2
os.ftruncate(rig.records, 0)
for chain in list(batch):
    chain.write(b"lost")
    rig.device.complete(chain)
rig.device.publish()
rig.offer_many(1)
try:
    rig.device.take()
except QueueBroken as error:
    assert error.reason is Reason.TRUNCATED, error
else:
    raise AssertionError("nothing noticed")
assert rig.device.in_flight == 0
if {what!r} == "log":
    assert rig.driver.collect() == []  # its pages were not marked
print("fine")
"""
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_region_that_is_gone_is_not_taken_for_a_new_one(engine: str, packed: bool) -> None:
    check(
        RECORDS
        + f"""
SigbusGuard.install()
rig = records(16, {engine!r}, {packed}, "inflight")
rig.offer_many(2)
rig.device.take()
os.ftruncate(rig.records, 0)
try:
    rig.new_device().take()
except QueueBroken as error:
    assert error.reason is Reason.TRUNCATED, error
else:
    raise AssertionError("nothing noticed")
print("fine")
"""
    )


def test_ranges_that_are_none_are_refused() -> None:
    check(
        """
        from virtqueue import UsageError
        word = ctypes.c_uint32()
        poison = ctypes.addressof(word)
        for wrong in ((0, 1, 4096, poison), (4096, 0, 4096, poison), (4096, 1, 100, poison),
                      (4096, 1, 0, poison), (4096, 1, 4096, 0)):
            try:
                SigbusGuard.watch_range(*wrong)
            except UsageError:
                continue
            raise AssertionError(wrong)
        SigbusGuard.unwatch_range(4096, 1)  # of nothing: harmless
        print("fine")
        """
    )


def test_an_unwatched_range_is_not_mended() -> None:
    done = run(
        """
        from guest_memory import SharedMapping
        SigbusGuard.install()
        fd = os.memfd_create("records")
        os.ftruncate(fd, 8192)
        mapping = SharedMapping(fd, 8192)
        watched = (*mapping.pages, mapping.page_size, mapping.poison_address)
        SigbusGuard.watch_range(*watched)
        SigbusGuard.watch_range(*watched)
        SigbusGuard.unwatch_range(*mapping.pages)
        os.ftruncate(fd, 0)
        ctypes.c_uint8.from_address(mapping.address).value
        assert mapping.poisoned
        SigbusGuard.unwatch_range(*mapping.pages)
        print("before", flush=True)
        ctypes.c_uint8.from_address(mapping.address + 4096).value
        """
    )
    assert (done.returncode, done.stdout) == (-7, "before\n")


@pytest.mark.parametrize("served", [0, 2])
@pytest.mark.parametrize("engine", ["c", "python"])
def test_a_lost_ring_breaks_the_queue(engine: str, served: int) -> None:
    """Whatever the zeroes that are read in its place look like."""
    check(
        f"""
        SigbusGuard.install()
        rig = lossy(engine={engine!r})
        SigbusGuard.watch(rig.memory)
        for _ in range({served}):
            rig.offer_many(1)
            rig.device.take()
            rig.device.cycle()
            rig.driver.collect()
        rig.offer_many(3)
        os.ftruncate(rig.fd, 0)
        try:
            rig.device.take()
            rig.device.take()
        except QueueBroken as error:
            assert error.reason is Reason.TRUNCATED, error
        else:
            raise AssertionError("not broken")
        print("fine")
        """
    )


def test_other_queues_go_on() -> None:
    check(
        """
        SigbusGuard.install()
        lost, kept = lossy(engine="c"), lossy(engine="c")
        SigbusGuard.watch(lost.memory)
        SigbusGuard.watch(kept.memory)
        os.ftruncate(lost.fd, 0)
        ctypes.c_uint8.from_address(host(lost, 4096)).value = 1
        kept.offer()
        kept.driver.publish()
        (chain,) = kept.device.take()
        chain.write(chain.read())
        kept.device.complete(chain)
        kept.device.publish()
        assert len(kept.driver.collect()) == 1
        print("fine")
        """
    )


def test_views_and_readers_in_c_survive() -> None:
    check(
        """
        SigbusGuard.install()
        rig = lossy()
        SigbusGuard.watch(rig.memory)
        view = rig.memory.view(GUEST + 8192, 4096)
        os.ftruncate(rig.fd, 0)
        assert bytes(view) == bytes(4096)
        view[:3] = b"abc"
        assert bytes(view[:4]) == b"abc\\0"
        assert rig.memory.poisoned
        print("fine")
        """
    )


def test_a_fault_elsewhere_goes_to_the_handler_before() -> None:
    check(
        """
        import faulthandler
        faulthandler.enable()
        SigbusGuard.install()
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            rig = lossy()
            os.ftruncate(rig.fd, 0)
            ctypes.c_uint8.from_address(host(rig, 0)).value
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
        print("fine")
        """
    )


def test_a_sent_signal_still_ends_the_process() -> None:
    done = run(
        """
        SigbusGuard.install()
        os.kill(os.getpid(), signal.SIGBUS)
        """
    )
    assert done.returncode == -7


def test_unwatched_memory_is_not_mended() -> None:
    done = run(
        """
        SigbusGuard.install()
        rig = lossy()
        SigbusGuard.watch(rig.memory)
        SigbusGuard.watch(rig.memory)
        SigbusGuard.unwatch(rig.memory)
        os.ftruncate(rig.fd, 4096)
        ctypes.c_uint8.from_address(host(rig, 8192)).value
        SigbusGuard.unwatch(rig.memory)
        print("before", flush=True)
        ctypes.c_uint8.from_address(host(rig, 16384)).value
        """
    )
    assert (done.returncode, done.stdout) == (-7, "before\n")


def test_hundreds_of_regions_in_many_threads() -> None:
    check(
        """
        import threading
        SigbusGuard.install()
        fd = os.memfd_create("many")
        count, size = 509, 16384
        os.ftruncate(fd, count * size)
        memory = GuestMemory.map(
            (Region(i * 2 * size, size, (1 << 40) + i * 2 * size, mmap_offset=i * size), fd)
            for i in range(count)
        )
        SigbusGuard.watch(memory)
        hosts = [memory.translate(i * 2 * size, size, 3) for i in range(count)]
        os.ftruncate(fd, 0)
        def touch():
            for address in hosts:
                for page in range(0, size, 4096):
                    assert ctypes.c_uint64.from_address(address + page).value == 0
        threads = [threading.Thread(target=touch) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert SigbusGuard.events() >= count * size // 4096
        print("fine")
        """
    )
