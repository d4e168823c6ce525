"""`XenMapper` against a recorder of system calls: what is asked, in which order, what is left."""

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guest_memory import (
    GuestAddress,
    GuestMemoryError,
    InvalidRegion,
    MappingFailed,
    Region,
    UsageError,
    UserAddress,
)
from vhost_xen import (
    ForeignMapError,
    GrantMapError,
    SystemCalls,
    XenAlignmentError,
    XenDomainError,
    XenFileError,
    XenFlagsError,
    XenMapError,
    XenMapper,
    XenRegionError,
    XenReleaseError,
    XenUnavailable,
    XenUsageError,
)
from vhost_xen import (
    calls as calls_module,
)

MMAPBATCH_V2 = 0x205004
MAP_GRANT_REF = 0x184700
UNMAP_GRANT_REF = 0x104701
FOREIGN, GRANT, ON_DEMAND = 1, 2, 2 | 8
GRANT_BIT = 1 << 63
READ, WRITE, BOTH = 1, 2, 3
FD = 77


class Recorder:
    """Answers like privcmd and gntdev do, and keeps count of all that it gave out.

    `fail` names a step that is to fail and how. `bad_frames` maps frame numbers to the errno that
    MMAPBATCH_V2 reports for them.
    """

    def __init__(self) -> None:
        self.page_size = 4096
        self.log: list[tuple[Any, ...]] = []
        self.fail: dict[str, BaseException] = {}
        self.bad_frames: dict[int, int] = {}
        self.character_device = True
        self.files: set[int] = set()
        self.mappings: dict[int, int] = {}
        self.grants: dict[int, int] = {}
        self._address = 0x7F00_0000_0000
        self._index = 0x1000
        self._fd = 500

    def _step(self, name: str) -> None:
        if name in self.fail:
            raise self.fail[name]

    @property
    def held(self) -> int:
        """How many things have been given out and not been given back."""
        return len(self.files) + len(self.mappings) + len(self.grants)

    def is_character_device(self, fd: int) -> bool:
        self._step("stat")
        return self.character_device

    def duplicate(self, fd: int) -> int:
        self.log.append(("duplicate", fd))
        self._step("duplicate")
        self._fd += 1
        self.files.add(self._fd)
        return self._fd

    def close(self, fd: int) -> None:
        self.log.append(("close", fd))
        self.files.remove(fd)

    def mmap(self, address: int, length: int, protection: int, fd: int, offset: int) -> int:
        self.log.append(("mmap", length, protection, fd, offset))
        self._step("mmap")
        if offset:
            assert fd in self.files
            assert self.grants[offset] * 4096 == length
        if not address:
            address = self._address
            self._address += 1 << 30
        self.mappings[address] = length
        return address

    def munmap(self, address: int, length: int) -> None:
        self.log.append(("munmap", address, length))
        self._step("munmap")
        assert self.mappings.pop(address) == length

    def ioctl(self, fd: int, request: int, argument: "ctypes.Array[ctypes.c_char]") -> None:
        answers: dict[int, Callable[[bytes, Any], None]] = {
            MMAPBATCH_V2: self._batch,
            MAP_GRANT_REF: self._map,
            UNMAP_GRANT_REF: self._unmap,
        }
        answers[request](argument.raw, argument)

    def _probe(self, count: int) -> None:
        if count == 0:
            self._step("probe")
            raise OSError(errno.EINVAL, "no pages")

    def _batch(self, data: bytes, argument: Any) -> None:
        count, domid, padding, address, frames_at, errors_at = struct.unpack("=IHHQQQ", data)
        self._probe(count)
        assert padding == 0
        frames = list((ctypes.c_uint64 * count).from_address(frames_at))
        self.log.append(("MMAPBATCH_V2", domid, address, frames))
        self._step("batch")
        assert self.mappings[address] == count * 4096
        errors = (ctypes.c_int * count).from_address(errors_at)
        for position, frame in enumerate(frames):
            errors[position] = -self.bad_frames.get(frame, 0)

    def _map(self, data: bytes, argument: Any) -> None:
        count, padding, index = struct.unpack_from("=IIQ", data)
        self._probe(count)
        assert (padding, index, len(data)) == (0, 0, 16 + 8 * count)
        self.log.append(("MAP_GRANT_REF", list(struct.iter_unpack("=II", data[16:]))))
        self._step("map")
        self._index += 0x1000 * count
        self.grants[self._index] = count
        struct.pack_into("=Q", argument, 8, self._index)

    def _unmap(self, data: bytes, argument: Any) -> None:
        index, count, padding = struct.unpack("=QII", data)
        assert padding == 0
        self.log.append(("UNMAP_GRANT_REF", index, count))
        self._step("unmap")
        assert self.grants.pop(index) == count


class Window:
    """Stands in for guest_memory's window: which parts are taken, and which were covered."""

    def __init__(self, system: Recorder) -> None:
        self.taken: dict[int, int] = {}
        self.system = system

    def take(self, length: int, alignment: int, remainder: int = 0) -> int:
        assert (alignment, remainder) == (4096, 0)
        self.taken[0x5000_0000_0000] = length
        return 0x5000_0000_0000

    def cover(self, address: int, length: int) -> None:
        del self.system.mappings[address]
        assert self.taken.pop(address) == length

    def restore(self, address: int, length: int) -> None:
        assert address not in self.system.mappings
        assert self.taken.pop(address) == length


@pytest.fixture
def system() -> Recorder:
    return Recorder()


@pytest.fixture
def mapper(system: Recorder) -> XenMapper:
    calls: SystemCalls = system
    return XenMapper(calls=calls)


def region(
    flags: int, address: int = 0x40000, size: int = 0x3000, domid: int = 5, offset: int = 0
) -> Region:
    return Region(GuestAddress(address), size, UserAddress(0), offset, flags, domid)


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# Foreign mappings


def test_foreign_calls_in_order(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(FOREIGN), FD)
    address = mapping.host_address
    assert address is not None
    assert system.log == [
        ("mmap", 0x3000, 3, FD, 0),
        ("MMAPBATCH_V2", 5, address, [0x40, 0x41, 0x42]),
    ]
    assert (mapping.size, mapping.page_size, mapping.poisoned) == (0x3000, 4096, False)
    system.log.clear()
    mapping.close()
    assert system.log == [("munmap", address, 0x3000)]
    assert system.held == 0


def test_foreign_region_that_ends_within_a_page(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(FOREIGN, size=0x1001), FD)
    assert mapping.size == 0x1001
    assert system.log[0] == ("mmap", 0x2000, 3, FD, 0)
    assert system.log[1][3] == [0x40, 0x41]
    mapping.close()
    assert system.held == 0


def test_foreign_pages_that_failed_are_listed_and_nothing_stays(
    mapper: XenMapper, system: Recorder
) -> None:
    system.bad_frames = {0x41: errno.EINVAL, 0x42: errno.ESRCH}
    with pytest.raises(ForeignMapError) as caught:
        mapper.map(region(FOREIGN), FD)
    error = caught.value
    assert isinstance(error, MappingFailed)
    assert error.failures == ((0x41, errno.EINVAL), (0x42, errno.ESRCH))
    assert (error.failed, error.count, error.frame, error.domid) == (2, 3, 0x40, 5)
    assert (error.errno, error.call) == (errno.EINVAL, "MMAPBATCH_V2")
    assert "2 of 3 frames of domain 5 from 0x41" in str(error)
    assert system.held == 0


def test_foreign_failures_are_kept_in_bounds(mapper: XenMapper, system: Recorder) -> None:
    system.bad_frames = dict.fromkeys(range(0x40, 0x440), errno.EINVAL)
    with pytest.raises(ForeignMapError) as caught:
        mapper.map(region(FOREIGN, size=0x400 * 4096), FD)
    assert (caught.value.failed, len(caught.value.failures)) == (0x400, 64)


@pytest.mark.parametrize(("step", "call"), [("mmap", "mmap"), ("batch", "MMAPBATCH_V2")])
def test_foreign_request_refused(mapper: XenMapper, system: Recorder, step: str, call: str) -> None:
    system.fail[step] = os_error(errno.EPERM)
    with pytest.raises(ForeignMapError) as caught:
        mapper.map(region(FOREIGN), FD)
    assert (caught.value.errno, caught.value.call) == (errno.EPERM, call)
    assert (caught.value.failed, caught.value.failures) == (0, ())
    assert "3 frames of domain 5 from 0x40" in str(caught.value)
    assert system.held == 0


def test_a_failed_unmap_of_frames_is_loud(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(FOREIGN), FD)
    system.fail["munmap"] = os_error(errno.ENOMEM)
    with pytest.raises(XenReleaseError, match="munmap"):
        mapping.close()


def test_foreign_goes_into_a_window_and_leaves_it_covered(
    mapper: XenMapper, system: Recorder
) -> None:
    window = Window(system)
    mapping = mapper.map_into(region(FOREIGN), FD, window)  # type: ignore[arg-type]
    assert mapping.host_address == 0x5000_0000_0000
    assert window.taken
    mapping.close()
    assert not window.taken
    assert system.held == 0
    for step in ("mmap", "batch"):
        system.fail = {step: os_error(errno.ENOMEM)}
        with pytest.raises(ForeignMapError):
            mapper.map_into(region(FOREIGN), FD, window)  # type: ignore[arg-type]
        assert not window.taken
        assert system.held == 0


# Grants at once


@pytest.mark.parametrize("mark", [0, GRANT_BIT])
def test_grant_calls_in_order(mapper: XenMapper, system: Recorder, mark: int) -> None:
    mapping = mapper.map(region(GRANT, address=0x40000 | mark), FD)
    address = mapping.host_address
    own, index = 501, 0x4000
    assert system.log == [
        ("duplicate", FD),
        ("MAP_GRANT_REF", [(5, 0x40), (5, 0x41), (5, 0x42)]),
        ("mmap", 0x3000, 3, own, index),
    ]
    system.log.clear()
    mapping.close()
    assert system.log == [
        ("munmap", address, 0x3000),
        ("UNMAP_GRANT_REF", index, 3),
        ("close", own),
    ]
    assert mapping.host_address is None
    mapping.close()
    assert system.held == 0


def test_grants_stay_out_of_windows(mapper: XenMapper, system: Recorder) -> None:
    window = Window(system)
    mapping = mapper.map_into(region(GRANT), FD, window)  # type: ignore[arg-type]
    assert not window.taken
    mapping.close()
    assert system.held == 0


@pytest.mark.parametrize("size", [1, 0x400, 0xFFF, 0x1000])
def test_grant_region_smaller_than_a_page(mapper: XenMapper, system: Recorder, size: int) -> None:
    mapping = mapper.map(region(GRANT, size=size), FD)
    assert mapping.size == size
    assert system.log[1] == ("MAP_GRANT_REF", [(5, 0x40)])
    assert mapping.pin(GuestAddress(0x40000 + size - 1), 1, READ)[0] == (
        (mapping.host_address or 0) + size - 1
    )
    with pytest.raises(XenUsageError):
        mapping.pin(GuestAddress(0x40000 + size), 1, READ)
    mapping.close()
    assert system.held == 0


def test_many_references_go_in_one_call(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(GRANT, size=1024 * 4096), FD)
    assert system.log[1] == ("MAP_GRANT_REF", [(5, 0x40 + i) for i in range(1024)])
    mapping.close()
    assert system.log[-2][2] == 1024


@pytest.mark.parametrize(("step", "call"), [("map", "MAP_GRANT_REF"), ("mmap", "mmap")])
def test_refused_grants_are_given_back(
    mapper: XenMapper, system: Recorder, step: str, call: str
) -> None:
    system.fail[step] = os_error(errno.EINVAL)
    with pytest.raises(GrantMapError) as caught:
        mapper.map(region(GRANT), FD)
    error = caught.value
    assert isinstance(error, MappingFailed)
    assert (error.errno, error.call, error.domid) == (errno.EINVAL, call, 5)
    assert (error.reference, error.count, error.writable) == (0x40, 3, True)
    assert "grants 64..66 of domain 5 (writable)" in str(error)
    assert system.held == 0
    assert (("UNMAP_GRANT_REF", 0x4000, 3) in system.log) == (step == "mmap")


def test_grants_without_a_file_of_our_own(mapper: XenMapper, system: Recorder) -> None:
    system.fail["duplicate"] = os_error(errno.EMFILE)
    for flags in (GRANT, ON_DEMAND):
        with pytest.raises(GuestMemoryError) as caught:
            mapper.map(region(flags), FD)
        assert isinstance(caught.value, XenMapError)
        assert (caught.value.errno, caught.value.call) == (errno.EMFILE, "dup")
    assert system.held == 0


@pytest.mark.parametrize("step", ["mmap", "map", "batch"])
@pytest.mark.parametrize("flags", [FOREIGN, GRANT])
def test_interrupts_release_too(mapper: XenMapper, system: Recorder, flags: int, step: str) -> None:
    system.fail[step] = KeyboardInterrupt()
    if (flags, step) in {(FOREIGN, "map"), (GRANT, "batch")}:
        mapper.map(region(flags), FD).close()
    else:
        with pytest.raises(KeyboardInterrupt):
            mapper.map(region(flags), FD)
    assert system.held == 0


@pytest.mark.parametrize(("step", "call"), [("munmap", "munmap"), ("unmap", "UNMAP_GRANT_REF")])
def test_a_failed_release_is_loud_and_does_the_rest(
    mapper: XenMapper, system: Recorder, step: str, call: str
) -> None:
    mapping = mapper.map(region(GRANT), FD)
    system.fail[step] = os_error(errno.EFAULT)
    with pytest.raises(XenReleaseError) as caught:
        mapping.close()
    assert (caught.value.errno, caught.value.call) == (errno.EFAULT, call)
    assert not system.files
    assert len(system.mappings) == (step == "munmap")
    assert len(system.grants) == (step == "unmap")
    mapping.close()


# Grants on demand


def test_on_demand_maps_nothing_in_advance(mapper: XenMapper, system: Recorder) -> None:
    for flags in (2 | 8, 2 | 0x100):
        system.log.clear()
        mapping = mapper.map(region(flags, size=1 << 40), FD)
        assert mapping.host_address is None
        assert (mapping.size, mapping.page_size, mapping.poisoned) == (1 << 40, 4096, False)
        assert [entry[0] for entry in system.log] == ["duplicate"]
        mapping.close()
        assert system.held == 0


@pytest.mark.parametrize(
    ("address", "length", "references"),
    [
        (0x40000, 1, [0x40]),
        (0x40000, 0x1000, [0x40]),
        (0x40FFF, 1, [0x40]),
        (0x40FFF, 2, [0x40, 0x41]),
        (0x40800, 0x1000, [0x40, 0x41]),
        (0x41800, 0x1001, [0x41, 0x42]),
        (0x40001, 0x2FFF, [0x40, 0x41, 0x42]),
    ],
)
@pytest.mark.parametrize("mark", [0, GRANT_BIT])
def test_a_pin_maps_what_is_touched(
    mapper: XenMapper,
    system: Recorder,
    address: int,
    length: int,
    references: list[int],
    mark: int,
) -> None:
    mapping = mapper.map(region(ON_DEMAND, address=0x40000 | mark), FD)
    system.log.clear()
    host, token = mapping.pin(address | mark, length, BOTH)
    pages = len(references)
    (base,) = system.mappings
    assert host == base + (address & 0xFFF)
    index = 0x1000 + 0x1000 * pages
    assert system.log == [
        ("MAP_GRANT_REF", [(5, reference) for reference in references]),
        ("mmap", pages << 12, 3, 501, index),
    ]
    system.log.clear()
    mapping.unpin(token)
    assert system.log == [("munmap", base, pages << 12), ("UNMAP_GRANT_REF", index, pages)]
    mapping.close()
    assert system.held == 0


@pytest.mark.parametrize(("access", "protection"), [(READ, 1), (WRITE, 3), (BOTH, 3)])
def test_what_is_only_read_is_mapped_for_reading(
    mapper: XenMapper, system: Recorder, access: int, protection: int
) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    _, token = mapping.pin(0x40000, 16, access)
    assert system.log[-1][2] == protection
    mapping.unpin(token)
    mapping.close()


def test_pins_nest(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    first, first_token = mapping.pin(0x40000, 8, READ)
    second, second_token = mapping.pin(0x40000, 8, READ)
    assert first != second
    mapping.unpin(first_token)
    assert list(system.mappings) == [second]
    mapping.unpin(second_token)
    assert not system.mappings
    mapping.close()
    assert system.held == 0


@pytest.mark.parametrize("step", ["map", "mmap"])
def test_a_pin_that_fails_leaves_the_mapping_usable(
    mapper: XenMapper, system: Recorder, step: str
) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    system.fail[step] = os_error(errno.EINVAL)
    with pytest.raises(GrantMapError) as caught:
        mapping.pin(0x41000, 0x1001, READ)
    error = caught.value
    assert (error.reference, error.count, error.writable, error.errno) == (
        0x41,
        2,
        False,
        errno.EINVAL,
    )
    assert not system.mappings
    assert not system.grants
    system.fail.clear()
    _, token = mapping.pin(0x41000, 0x1001, READ)
    mapping.unpin(token)
    mapping.close()
    assert system.held == 0


def test_pinned_pages_outlive_close(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    _, token = mapping.pin(0x40000, 8, READ)
    mapping.close()
    mapping.close()
    assert len(system.mappings) == len(system.files) == 1
    with pytest.raises(XenUsageError, match="closed"):
        mapping.pin(0x40000, 8, READ)
    mapping.unpin(token)
    assert system.held == 0


def test_close_during_a_pin_keeps_the_file(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    inside, go_on = threading.Event(), threading.Event()
    plain = system.mmap

    def slow(address: int, length: int, protection: int, fd: int, offset: int) -> int:
        inside.set()
        assert go_on.wait(60)
        return plain(address, length, protection, fd, offset)

    system.mmap = slow  # type: ignore[method-assign]
    pinned: list[tuple[int, Any]] = []
    thread = threading.Thread(target=lambda: pinned.append(mapping.pin(0x40000, 8, READ)))
    thread.start()
    assert inside.wait(60)
    mapping.close()
    assert system.files
    go_on.set()
    thread.join(60)
    mapping.unpin(pinned[0][1])
    assert system.held == 0


def test_pins_from_many_threads(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(50):
                _, token = mapping.pin(0x40000 + (number * turn) % 0x2000, 16, BOTH)
                mapping.unpin(token)
        except BaseException as error:
            failures.append(error)

    # The recorder is no kernel: its own steps are made one at a time.
    lock = threading.Lock()
    for name in ("mmap", "munmap", "ioctl"):
        setattr(system, name, _locked(lock, getattr(system, name)))
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    mapping.close()
    assert system.held == 0


def _locked(lock: threading.Lock, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with lock:
            return function(*arguments)

    return call


@pytest.mark.parametrize(
    ("address", "length", "access"),
    [
        (0x3FFFF, 1, READ),
        (0x40000, 0x3001, READ),
        (0x42FFF, 2, READ),
        (0x40000, 0, READ),
        (0x40000, -1, READ),
        (0x40000, 1, 0),
        (0x40000, 1, 4),
    ],
)
@pytest.mark.parametrize("flags", [FOREIGN, GRANT, ON_DEMAND])
def test_wrong_pins_are_the_callers_fault(
    mapper: XenMapper, system: Recorder, flags: int, address: int, length: int, access: int
) -> None:
    mapping = mapper.map(region(flags), FD)
    with pytest.raises(XenUsageError) as caught:
        mapping.pin(address, length, access)
    assert isinstance(caught.value, UsageError)
    mapping.close()
    with pytest.raises(XenUsageError, match="closed"):
        mapping.pin(0x40000, 1, READ)
    assert system.held == 0


def test_a_token_is_good_once(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    other = mapper.map(region(ON_DEMAND), FD)
    _, token = mapping.pin(0x40000, 1, READ)
    with pytest.raises(XenUsageError):
        other.unpin(token)
    mapping.unpin(token)
    with pytest.raises(XenUsageError):
        mapping.unpin(token)
    mapping.close()
    other.close()
    assert system.held == 0


def test_an_unpin_that_fails_is_loud(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(ON_DEMAND), FD)
    _, token = mapping.pin(0x40000, 1, READ)
    system.fail["unmap"] = os_error(errno.EFAULT)
    with pytest.raises(XenReleaseError):
        mapping.unpin(token)
    mapping.close()
    assert not system.files
    assert not system.mappings


@pytest.mark.parametrize("flags", [GRANT, ON_DEMAND])
def test_a_front_end_that_gives_our_grants_back(
    mapper: XenMapper, system: Recorder, flags: int
) -> None:
    """It has the same open file, so it can; that is nothing to be loud about."""
    mapping = mapper.map(region(flags), FD)
    token = mapping.pin(0x40000, 8, READ)[1]
    system.fail["unmap"] = os_error(errno.ENOENT)
    mapping.unpin(token)
    mapping.close()
    assert not system.mappings
    assert not system.files
    system.fail["mmap"] = os_error(errno.EINVAL)
    with pytest.raises(GrantMapError):
        mapper.map(region(GRANT), FD)


@pytest.mark.parametrize("flags", [FOREIGN, GRANT, ON_DEMAND])
def test_a_mapping_that_is_forgotten_is_released(
    mapper: XenMapper, system: Recorder, flags: int
) -> None:
    mapping = mapper.map(region(flags), FD)
    assert system.held
    del mapping
    assert system.held == 0


# What comes before any call


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (region(3), XenFlagsError),
        (region(1 | 8), XenFlagsError),
        (region(0x10), XenFlagsError),
        (region(FOREIGN, domid=0x10005), XenDomainError),
        (region(GRANT, domid=0x7FF0), XenDomainError),
        (region(GRANT, address=0x40800), XenAlignmentError),
        (region(ON_DEMAND, address=0x40001), XenAlignmentError),
        (region(ON_DEMAND, address=GRANT_BIT | 1 << 44), XenRegionError),
        (region(FOREIGN, offset=0x1000), XenFileError),
        (region(GRANT, offset=1), XenFileError),
        (region(ON_DEMAND, offset=1), XenFileError),
        (region(FOREIGN, address=1 << 52), XenRegionError),
        (region(GRANT, size=(1 << 20) * 4096 + 1), XenRegionError),
        (region(FOREIGN, size=(1 << 28) * 4096 + 1), XenRegionError),
    ],
)
def test_wrong_regions_reach_no_call(
    mapper: XenMapper, system: Recorder, wrong: Region, error: type[XenRegionError]
) -> None:
    with pytest.raises(error) as caught:
        mapper.map(wrong, FD)
    assert isinstance(caught.value, InvalidRegion)
    assert (caught.value.address, caught.value.length) == (wrong.guest_address, wrong.size)
    assert system.log == []
    assert system.held == 0


@pytest.mark.parametrize(
    ("flags", "device"),
    [(FOREIGN, "/dev/xen/privcmd"), (GRANT, "/dev/xen/gntdev"), (ON_DEMAND, "/dev/xen/gntdev")],
)
def test_the_file_has_to_be_the_device(
    mapper: XenMapper, system: Recorder, flags: int, device: str
) -> None:
    attempts: list[tuple[int | None, dict[str, BaseException], bool]] = [
        (None, {}, True),
        (FD, {}, False),
        (FD, {"probe": os_error(errno.ENOTTY)}, True),
        (FD, {"probe": os_error(errno.EPERM)}, True),
        (FD, {"stat": os_error(errno.EBADF)}, True),
    ]
    for fd, system.fail, system.character_device in attempts:
        with pytest.raises(XenFileError) as caught:
            mapper.map(region(flags), fd)
        assert caught.value.device == device
        assert device in str(caught.value)
    assert system.log == []


def test_a_large_pin_is_refused(mapper: XenMapper, system: Recorder) -> None:
    mapping = mapper.map(region(ON_DEMAND, size=1 << 40), FD)
    with pytest.raises(XenRegionError, match="at once"):
        mapping.pin(0x40000, (1 << 32) + 1, READ)
    mapping.close()
    assert system.held == 0


def test_pages_of_another_size_are_not_xens(mapper: XenMapper, system: Recorder) -> None:
    system.page_size = 0x10000
    for flags in (FOREIGN, GRANT, ON_DEMAND):
        with pytest.raises(XenUnavailable, match="65536"):
            mapper.map(region(flags), FD)
    assert system.log == []


# The real calls, as far as they go without Xen


def test_plain_regions_are_mapped_as_files(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(b"guest" + bytes(4091))
    with open(file, "r+b") as memory:
        mapping = XenMapper().map(region(0, size=4096), memory.fileno())
    try:
        assert ctypes.string_at(mapping.host_address or 0, 5) == b"guest"
    finally:
        mapping.close()


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/proc/self/maps"])
@pytest.mark.parametrize("flags", [FOREIGN, GRANT, ON_DEMAND])
def test_files_that_are_not_the_device(path: str, flags: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open(path, "rb") as file, pytest.raises(XenFileError):
        XenMapper().map(region(flags, size=1 << 30), file.fileno())
    with pytest.raises(XenFileError):
        XenMapper().map(region(flags), 1 << 20)
    assert len(os.listdir("/proc/self/fd")) == before


# Forked children


@pytest.mark.parametrize("flags", [FOREIGN, GRANT, ON_DEMAND])
def test_a_forked_child_takes_nothing_of_its_parents_down(
    mapper: XenMapper, system: Recorder, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    """The open file is the parent's too: grants that a child gives back are gone for both."""
    mapping = mapper.map(region(flags), FD)
    token = mapping.pin(0x40000, 16, 3)[1]
    system.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(calls_module, "_generation", calls_module.generation() + 1)
        mapping.unpin(token)
        mapping.close()
        # A child has a duplicate of the file of its own, which it closes.
        assert {name for name, *_ in system.log} <= {"close"}
    assert not system.files
