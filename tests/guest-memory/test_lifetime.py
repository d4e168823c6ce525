# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""When memory is mapped, how, and when it goes: seen from /proc/self/maps and smaps."""

import ctypes
import gc
import os
import re
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_memory_support import NAME, SEALED, mapped, memfd, open_fds, region

import guest_memory.regions.window as window_module
from guest_memory import (
    DirtyLog,
    GuestMemory,
    MappingFailed,
    MmapMapper,
    MmapMapping,
    Region,
    SharedMapping,
    UserAddress,
    Window,
    WindowFull,
)
from guest_memory.linux import syscalls

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    gc.collect()
    before, lines = open_fds(), mapped()
    yield
    gc.collect()
    assert open_fds() == before
    assert mapped() == lines == 0


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are full soon."""
    monkeypatch.setattr(window_module, "_USUAL_SIZE", 1 << 23)


def area(address: int) -> list[str]:
    """The lines of smaps about the mapping that holds an address."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line)]
    for head, following in zip(heads, [*heads[1:], len(lines)], strict=True):
        start, end = (int(part, 16) for part in lines[head].split()[0].split("-"))
        if start <= address < end:
            return lines[head:following]
    return []


def test_a_mapping_lives_as_long_as_its_last_snapshot() -> None:
    with memfd(0x3000, SEALED) as fd:
        one, two, three = (region(n * 0x1000, 0x1000, n * 0x1000) for n in range(3))
        memory = GuestMemory.map([(one, fd), (two, fd)])
        # Regions at neighbouring places of file and window may be one line of the list.
        assert _bytes() == 0x2000
        bigger = memory.add(three, fd)
        assert _bytes() == 0x3000
        smaller = bigger.remove(one)
        assert _bytes() == 0x3000
        del bigger
        assert _bytes() == 0x3000, "the first snapshot has region one"
        del memory
        assert _bytes() == 0x2000
        rest = smaller.remove(two).with_iotlb(None).with_log(None)
        del smaller
        assert _bytes() == 0x1000
        rest.write(0x2000, b"still here")
        del rest
        assert _bytes() == 0


def _bytes() -> int:
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if NAME in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            total += end - start
    return total


def test_a_view_keeps_its_region_and_nothing_else() -> None:
    with memfd(0x4000, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 0x1000), fd), (region(0x10000, 0x1000, 0x2000), fd)])
    memory.write(0x10000, b"kept")
    view = memory.view(0x10000, 4)
    part = view[1:3]
    other = memory.views(0, 8)[0]
    window, base, at = memory.window, memory.window_base, memory.translate(0x10000, 4)
    del memory
    assert _bytes() == 0x2000
    del other, view
    assert _bytes() == 0x1000
    assert bytes(part) == b"ep"
    part[:] = b"EP"
    assert window is not None
    assert bytes(window[at - base : at - base + 4]) == b"kEPt"
    del part
    assert _bytes() == 0
    # A stale offset reads zeroes and writes nowhere; it neither faults nor meets strangers.
    assert bytes(window[at - base : at - base + 4]) == bytes(4)
    window[at - base] = 1


def test_a_view_under_a_guard_keeps_the_snapshot_that_is_watched() -> None:
    with memfd(0x2000) as fd:
        memory = GuestMemory.map(
            [(region(0, 0x1000), fd), (region(0x10000, 0x1000, 0x1000), fd)],
            MmapMapper(guarded=True),
        )
    watch = weakref.ref(memory)
    part = memory.view(0, 16)[4:]
    del memory
    gone = watch() is None
    assert not gone
    del part
    gone = watch() is None
    assert gone
    assert _bytes() == 0


def test_a_numpy_array_keeps_its_region() -> None:
    numpy = pytest.importorskip("numpy")
    with memfd(0x1000, SEALED) as fd:
        array: Any = numpy.frombuffer(
            GuestMemory.map([(region(0, 0x1000), fd)]).view(0, 0x1000), dtype="<u4"
        )
    array[3] = 7
    assert mapped() == 1
    del array
    assert mapped() == 0


def test_flags_of_the_mapping() -> None:
    with memfd(0x1000, SEALED) as sealed, memfd(0x1000) as unsealed:
        memory = GuestMemory.map([(region(0, 0x1000), sealed), (region(0x1000, 0x1000), unsealed)])
    for host in memory.host_addresses:
        assert host is not None
        lines = area(host)
        assert NAME in lines[0]
        assert " rw-s " in lines[0]
        flags = next(line for line in lines if line.startswith("VmFlags")).split()
        assert "dd" in flags, "in core dumps"
        assert "dc" in flags, "copied by fork"
        assert "Rss:                   0 kB" in lines, "a page was touched"
    # The window around it: reserved, not accessible, not dumped, not copied.
    lines = area(memory.window_base + (1 << 30))
    assert " ---p " in lines[0]
    flags = next(line for line in lines if line.startswith("VmFlags")).split()
    assert {"dd", "dc", "nr"} <= set(flags)


def _fork() -> int:
    with warnings.catch_warnings():
        # The test runner may have threads; the child does nothing that could wait for them.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def test_forked_children_have_no_guest_memory() -> None:
    with memfd(0x1000, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 0x1000), fd)])
    reader, writer = os.pipe()
    child = _fork()
    if not child:
        os.write(writer, str(mapped()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 9) == b"0"
    os.close(reader)
    os.close(writer)
    assert len(memory) == 1


def test_forked_children_unmap_nothing_that_is_theirs() -> None:
    """Objects that end in a child must not touch the child's own memory at those addresses."""
    with memfd(0x1000, SEALED) as fd, memfd(0x1000) as unsealed:
        memory = GuestMemory.map([(region(0, 0x1000), fd), (region(0x1000, 0x1000), unsealed)])
        shared = SharedMapping(unsealed, 0x1000)
        log = DirtyLog(unsealed, 0x1000)
    hosts = [host for host in memory.host_addresses if host]
    hosts += [shared.address, log.struct.bitmap]
    child = _fork()
    if not child:
        try:
            for host in hosts:
                assert not area(host)
                # MAP_FIXED_NOREPLACE: what a child happens to have there of its own.
                assert syscalls.map_memory(host, 4096, 3, 0x100022, -1, 0) == host
                ctypes.c_uint8.from_address(host).value = 42
            del memory, shared, log
            gc.collect()
            for host in hosts:
                assert ctypes.c_uint8.from_address(host).value == 42
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    memory.write(0, b"the parent's is untouched")


def test_huge_tables_cost_no_memory() -> None:
    """509 regions of mixed size, 16 TiB together, and nothing is touched."""
    with memfd(1 << 44, SEALED) as fd:
        sizes = [(1 << 35) - (n % 7) * 4096 - n for n in range(508)]
        sizes.append((1 << 44) - sum(sizes))
        table, address = [], 0
        for size in sizes:
            table.append((region(address * 2, size, address), fd))
            address += size
        before = _resident()
        memory = GuestMemory.map(table)
        assert sum(r.size for r in memory.regions) == 1 << 44
        assert memory.window is not None
        assert len(memory.window) >= 1 << 44
        assert len(memory.pieces(memory.regions[7].guest_address, 4096)) == 1
        assert _resident() - before < 16 * MIB
        last = memory.regions[-1]
        memory = memory.remove(last).add(last, fd)
        assert all(area(h or 0)[2:] for h in memory.host_addresses[:3])
        assert _resident() - before < 16 * MIB
        assert os.fstat(fd).st_blocks == 0


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_many_connections_fit_one_address_space() -> None:
    with memfd(0x1000, SEALED) as fd:
        memories = [GuestMemory.map([(region(0, 0x1000), fd)]) for _ in range(1000)]
        assert all(memory.window is not None for memory in memories)
    assert _bytes() == 1000 * 0x1000


@pytest.mark.usefixtures("small_windows")
def test_a_full_window_grows_and_old_snapshots_keep_theirs() -> None:
    with memfd(16 * MIB, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 2 * MIB, 4096), fd)])
        memory.write(0, b"first")
        view = memory.view(0, 5)
        old_window = memory.window
        snapshots = [memory]
        for n in range(1, 6):
            memory = memory.add(region(n << 24, 2 * MIB, n * 2 * MIB), fd)
            memory.write(n << 24, bytes([n]))
            snapshots.append(memory)
        assert memory.window is not None
        assert memory.window is not old_window
        assert len(memory.window) > 1 << 23
        for address, host in zip(
            (r.guest_address for r in memory.regions), memory.host_addresses, strict=True
        ):
            assert host is not None
            offset = host - memory.window_base
            assert 0 <= offset < len(memory.window), "all of it moved into the larger window"
            assert memory.window[offset] == memory.read(address, 1)[0]
            flags = next(line for line in area(host) if line.startswith("VmFlags")).split()
            assert {"dd", "dc"} <= set(flags)
        # One memory behind both: what is written here is seen there.
        memory.write(0, b"FIRST")
        assert bytes(view) == snapshots[0].read(0, 5) == b"FIRST"
        assert snapshots[1].window is old_window
        # And one fate.
        poison = ctypes.c_uint32.from_address(
            ctypes.c_uint64.from_address(memory.table.regions + 32).value
        )
        for value in (0, 1):
            poison.value = value
            assert snapshots[0].poisoned is bool(value)
        del snapshots, view, old_window
        assert _bytes() == 6 * 2 * MIB


@pytest.mark.usefixtures("small_windows")
def test_nothing_moves_during_postcopy() -> None:
    with memfd(64 * MIB, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 2 * MIB), fd)]).with_postcopy(True)
        before = memory.host_addresses
        for n in range(1, 6):
            memory = memory.add(region(n << 24, 8 * MIB, n * 8 * MIB), fd)
        assert memory.host_addresses[:1] == before
        assert memory.window is not None
        outside = [
            host
            for host in memory.host_addresses
            if host and not 0 <= host - memory.window_base < len(memory.window)
        ]
        assert outside
        assert memory.read(5 << 24, 1) == b"\0"


@pytest.mark.usefixtures("small_windows")
def test_when_growing_fails_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with memfd(64 * MIB, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 2 * MIB), fd), (region(1 << 24, MIB), fd)])
        assert memory.window is not None
        end = memory.window_base + len(memory.window)
        big = region(1 << 30, 64 * MIB)
        before = _bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Window, "reserve", classmethod(lambda _cls, _needed: None))
            outside = memory.add(big, fd)
            assert outside.window is memory.window, "no larger window, so the rest lies elsewhere"
            assert outside.read(1 << 30, 1) == b"\0"
            del outside
        assert _bytes() == before
        real = syscalls.map_memory
        window = memory.window_base

        def refuse(address: int, length: int, prot: int, flags: int, fd: int, at: int) -> int:
            if fd >= 0 and not window <= address < end:
                raise MappingFailed(12)
            return real(address, length, prot, flags, fd, at)

        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "map_memory", refuse)
            with pytest.raises(MappingFailed):
                memory.add(big, fd)
        assert _bytes() == before
        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "duplicate_mapping", _refuse)
            apart = memory.add(big, fd)
        assert apart.host_addresses[:2] == memory.host_addresses
        assert apart.read(0, 1) == b"\0"


def _refuse(*_: Any) -> Any:
    raise MappingFailed(12, "mremap")


def test_failures_in_the_middle_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system call that a table of three regions makes fails once."""
    with memfd(0x3000, SEALED) as fd, memfd(0x1000) as unsealed:
        table = [(region(n << 20, 0x1000, n << 12), fd) for n in range(3)]
        table.append((region(1 << 30, 0x1000), unsealed))
        for name in ("map_memory", "file_system"):
            real = getattr(syscalls, name)
            for fatal in range(8):
                calls = 0

                def failing(*arguments: Any, fatal: int = fatal, real: Any = real) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == fatal + 1:
                        raise MappingFailed(12, "test")
                    return real(*arguments)

                with monkeypatch.context() as patch:
                    patch.setattr(syscalls, name, failing)
                    try:
                        memory = GuestMemory.map(table)
                    except MappingFailed:
                        pass
                    else:
                        # A window that cannot be had is no failure: regions are mapped elsewhere.
                        assert calls <= fatal or fatal == 0
                        del memory
                if mapped():
                    gc.collect()
                assert mapped() == 0, (name, fatal)


def test_an_interrupted_table_leaves_nothing() -> None:
    class Interrupted(MmapMapper):
        calls = 0

        def map_into(self, region: Region, fd: int | None, window: Window) -> MmapMapping:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().map_into(region, fd, window)

    with memfd(0x4000, SEALED) as fd, pytest.raises(KeyboardInterrupt):
        GuestMemory.map([(region(n << 20, 0x1000), fd) for n in range(4)], Interrupted())
    assert mapped() == 0


def test_a_region_that_is_refused_gives_its_place_back() -> None:
    with memfd(0x1000, SEALED | 8) as unwritable, memfd(0x1000, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 0x1000), fd)])
        for _ in range(100):
            with pytest.raises(MappingFailed):
                memory.add(region(0x10000, 0x1000), unwritable)
        again = memory.add(region(0x10000, 0x1000), fd)
        assert again.translate(0x10000, 1) - again.translate(0, 1) == 0x1000
        place = again.translate(0x10000, 1)
        again.write(0x10000, b"old")
        del again
        fresh = memory.add(region(0x20000, 0x1000), fd)
        assert fresh.translate(0x20000, 1) == place, "places are used again"


def test_windows_are_reserved_at_need_and_given_back() -> None:
    lines = len(Path("/proc/self/maps").read_text().splitlines())
    assert Window.reserve(1 << 62) is None
    window = Window(1 << 30)
    assert area(window.base)
    view, base = window.view, window.base
    del window
    assert area(base), "a view keeps the range"
    del view
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= lines


def test_places_in_a_window() -> None:
    window = Window(1 << 23)
    first = window.take(4096, 4096)
    second = window.take(1 << 21, 1 << 21, 8192)
    assert first == window.base
    assert (second - 8192) % (1 << 21) == 0
    with pytest.raises(WindowFull):
        window.take(1 << 23, 4096)
    third = window.take(4096, 4096)
    assert third == first + 4096 or second == first + 4096
    assert window.taken == max(second + (1 << 21), third + 4096) - window.base
    window.give_back(first, 4096)
    window.give_back(second, 1 << 21)
    window.give_back(third, 4096)
    assert window.taken == 0
    assert window.take(1 << 23, 4096) == window.base
    assert window.taken == 1 << 23
    with pytest.raises(WindowFull):
        window.take(1, 1)


def test_closing_twice_is_closing_once() -> None:
    with memfd(0x1000, SEALED) as fd:
        mapping = MmapMapper().map(region(0, 0x1000), fd)
    threads = [threading.Thread(target=mapping.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mapped() == 0
    with pytest.raises(ValueError, match="token"):
        mapping.unpin(None)


def test_nothing_waits_for_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        with memfd(0x2000, SEALED) as fd:
            memory = GuestMemory.map([(region(0, 0x1000), fd)])
            watch = weakref.ref(memory)
            memory = memory.add(region(0x1000, 0x1000), fd).remove(memory.regions[0])
            gone = watch() is None
            assert gone
            view = memory.view(0x1000, 1)
            del memory, view
            log = DirtyLog(fd, 64)
            shared = SharedMapping(fd, 64)
            view = shared.view
            log.close()
            shared.close()
            assert mapped() == 1
            assert bytes(view[:2]) == bytes(2)
            del view
            assert mapped() == 0
    finally:
        gc.enable()


@pytest.mark.skipif(
    int(Path("/proc/sys/vm/nr_hugepages").read_text()) < 2, reason="no huge pages are set aside"
)
@pytest.mark.parametrize("guarded", [False, True])
def test_huge_pages(guarded: bool) -> None:
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, 4 * MIB)
        memory = GuestMemory.map(
            [(Region(region(0, 1)[0], 0x1000, UserAddress(0), 3 * MIB + 0x1000), fd)],
            MmapMapper(guarded=guarded),
        )
        memory.write(0, b"huge")
        memory.store(0x10, 2, 0xFFFF)
        assert os.pread(fd, 4, 3 * MIB + 0x1000) == b"huge"
        assert memory.ranges[0][1:] == (2 * MIB, 2 * MIB)
        assert memory.bounded
        assert (memory.window is not None) == guarded, "huge pages can run out, sealed or not"
    finally:
        os.close(fd)
