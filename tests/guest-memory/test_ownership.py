# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""Nothing is mapped, unmapped or covered at an address that is not held.

In whatever order things end: in a reference cycle, in a forked child, in a collection in the middle
of a call, after a refusal.
"""

import ctypes
import gc
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_memory_support import SEALED, memfd, region, run

from guest_memory import GuestMemory, MappingFailed, Userfault, Window, WindowFull
from guest_memory.linux import syscalls

PAGE = 4096
MIB = 1 << 20
MAP_FIXED = 0x10


class Holder:
    """Something that can refer to itself."""


class Book:
    """What this process holds, by the calls that it makes: wrong ones are written down."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gone: list[tuple[int, int]] = []
        self.wrong: list[str] = []
        self._map, self._unmap = syscalls.map_memory, syscalls.unmap_memory
        patch.setattr(syscalls, "map_memory", self.map)
        patch.setattr(syscalls, "unmap_memory", self.unmap)

    def map(self, address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
        if flags & MAP_FIXED and self._is_gone(address, length):
            self.wrong.append(f"mapped over {address:#x}")
        place = self._map(address, length, prot, flags, fd, offset)
        self.gone = [(a, n) for a, n in self.gone if not (a < place + length and place < a + n)]
        return place

    def unmap(self, address: int, length: int) -> None:
        if self._is_gone(address, length):
            self.wrong.append(f"unmapped {address:#x} again")
        self._unmap(address, length)
        self.gone.append((address, length))

    def _is_gone(self, address: int, length: int) -> bool:
        return any(a < address + length and address < a + n for a, n in self.gone)


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def lines() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("first", ["memory", "window", "mapping"])
def test_a_memory_in_a_cycle_unmaps_what_is_its_own(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book(monkeypatch)
    before = lines()
    with memfd(4 * MIB, SEALED) as fd:
        for _ in range(20):
            memory = GuestMemory.map([(region(0, 4 * MIB), fd), (region(1 << 30, PAGE), fd)])
            memory.write(0, b"x")
            holder: Any = Holder()
            # The collector finalizes in the order in which it finds: the one asked for is found
            # from the holder first.
            entry = memory._entries[0]
            holder.first = {
                "memory": memory,
                "window": memory._state.window,
                "mapping": entry.mapping,
            }[first]
            holder.rest = [memory, memory.window, entry]
            holder.me = holder
            del memory, entry, holder
            gc.collect()
    assert not book.wrong
    assert lines() <= before + 2, "nothing stays mapped"


def test_no_other_thread_loses_its_memory_to_a_collection() -> None:
    stop = threading.Event()
    lost: list[int] = []
    collected = 0

    def work() -> None:
        while not stop.is_set():
            memory, fd = GuestMemory.allocate(4 * MIB)
            try:
                memory.write(0, b"\x5a" * 8)
                lost.extend(1 for _ in range(20) if memory.read(0, 8) != b"\x5a" * 8)
            finally:
                os.close(fd)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while collected < 400 and not lost:
            for _ in range(4):
                memory, fd = GuestMemory.allocate(4 * MIB)
                os.close(fd)
                holder: Any = Holder()
                holder.me, holder.memory = holder, memory
                del memory, holder
            gc.collect()
            collected += 4
    finally:
        stop.set()
        thread.join()
    assert not lost


def test_a_window_stays_while_a_place_is_out() -> None:
    window = Window(1 << 23)
    place = window.take(PAGE, PAGE)
    reservation, base = window._reservation, window.base
    # What the collector does to a cycle: the finalizer runs, and others have not yet.
    reservation.__del__()
    assert maps_at(base)
    with pytest.raises(WindowFull):
        window.take(PAGE, PAGE)
    window.cover(place, PAGE)
    assert not maps_at(base)
    window.cover(place, PAGE)
    assert not maps_at(base), "what comes back twice changes nothing any more"


def maps_at(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_a_place_comes_back_while_the_window_is_busy() -> None:
    """As when the collector runs inside of `take`: a finalizer must not wait for its own thread."""
    window = Window(1 << 23)
    place = window.take(PAGE, PAGE)
    with window._reservation._lock:
        window.give_back(place, PAGE)
    assert window.take(PAGE, PAGE) == place


def test_a_forked_child_maps_nothing_into_its_parents_window() -> None:
    with memfd(2 * PAGE, SEALED) as fd:
        memory = GuestMemory.map([(region(0, PAGE), fd)])
        free = memory.translate(0, PAGE) + PAGE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                # The child has something of its own where the parent's window has a gap.
                flags = syscalls.MAP_FIXED_NOREPLACE | 0x22
                assert syscalls.map_memory(free, PAGE, 3, flags, -1, 0) == free
                ctypes.c_uint8.from_address(free).value = 42
                more = memory.add(region(1 << 20, PAGE, PAGE), fd)
                more.write(1 << 20, b"child")
                del more, memory
                assert ctypes.c_uint8.from_address(free).value == 42
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Refusing:
    """A kernel that refuses MAP_FIXED after it has removed what was there.

    With ``stranger`` another thread's mapping falls into the hole.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, *, stranger: bool, writable: bool = False
    ) -> None:
        self.place = 0
        self.stranger = stranger
        self.writable = writable
        self._map = syscalls.map_memory
        patch.setattr(syscalls, "map_memory", self.map)

    def map(self, address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
        wanted = prot & 2 if self.writable else fd >= 0
        if flags & MAP_FIXED and wanted and not self.place:
            syscalls.unmap_memory(address, length)
            if self.stranger:
                fixed = 0x22 | syscalls.MAP_FIXED_NOREPLACE
                assert self._map(address, PAGE, 3, fixed, -1, 0) == address
                ctypes.c_uint8.from_address(address).value = 42
            self.place = address
            raise MappingFailed(12)
        return self._map(address, length, prot, flags, fd, offset)


@pytest.mark.parametrize("stranger", [False, True])
def test_a_refused_mapping_leaves_no_hole(stranger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with memfd(2 * PAGE, SEALED) as fd:
        memory = GuestMemory.map([(region(0, PAGE), fd)])
        with monkeypatch.context() as patch:
            kernel = Refusing(patch, stranger=stranger)
            with pytest.raises(MappingFailed):
                memory.add(region(1 << 20, PAGE, PAGE), fd)
        assert maps_at(kernel.place), "the place is held again, or it is somebody else's"
        again = memory.add(region(1 << 20, PAGE, PAGE), fd)
        assert (again.translate(1 << 20, 1) == kernel.place) is not stranger
        again.write(1 << 20, b"mine")
        window = memory.window_base
        del again, memory
        assert not maps_at(window), "the rest of the window is given back"
        assert maps_at(kernel.place) is stranger
        if stranger:
            assert ctypes.c_uint8.from_address(kernel.place).value == 42
            syscalls.unmap_memory(kernel.place, PAGE)


def test_a_refused_cover_leaves_no_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is not overcommitted, zero pages may be refused after the old ones went."""
    with memfd(2 * PAGE, SEALED) as fd:
        memory = GuestMemory.map([(region(0, PAGE), fd), (region(1 << 20, PAGE, PAGE), fd)])
        place = memory.translate(0, 1)
        with monkeypatch.context() as patch:
            kernel = Refusing(patch, stranger=False, writable=True)
            memory = memory.remove(memory.regions[0])
        assert kernel.place == place
        assert maps_at(place)
        assert memory.add(region(0, PAGE), fd).translate(0, 1) == place


def test_postcopy_in_a_cycle_leaves_others_ranges_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    unregistered: list[int] = []

    def ioctl(fd: int, request: int, argument: int) -> int:
        words = (ctypes.c_uint64 * 4).from_address(argument)
        if request == 0x8010AA01:
            unregistered.append(words[0])
        elif request == 0xC020AA00:
            words[3] = 1 << 2 | 1 << 3
        return 0

    monkeypatch.setattr(syscalls, "ioctl", ioctl)
    monkeypatch.setattr(syscalls, "syscall", lambda *_: os.open("/dev/null", os.O_RDONLY))
    with memfd(PAGE, SEALED) as fd:
        memory = GuestMemory.map([(region(0, PAGE), fd)])
        fault = Userfault()
        fault.register(memory)
        place = memory.translate(0, 1)
        # The collector may finalize the memory before what has it registered.
        memory._entries[0].release()
        fault.close()
        assert not unregistered
        memory = GuestMemory.map([(region(0, PAGE), fd)])
        with Userfault() as fault:
            fault.register(memory)
            place = memory.translate(0, 1)
        assert unregistered == [place]


def test_nothing_is_unmapped_at_the_end_of_the_interpreter() -> None:
    """A daemon thread may be in C with the memory; and modules may be empty."""
    done = run(
        """
import builtins, ctypes, os, sys
from guest_memory import DirtyLog, GuestMemory, SharedMapping, allocate_memfd
from guest_memory.linux import syscalls
fd = allocate_memfd(1 << 20)
class Late:
    def __del__(self):
        # Runs when builtins go: after the modules.
        self.read(self.address, 1)
late = Late()
memory, own = GuestMemory.allocate(1 << 20)
late.read, late.address = ctypes.string_at, memory.translate(0, 1)
shared, log = SharedMapping(fd, 4096), DirtyLog(fd, 4096)
builtins.kept = [memory, shared, log]
builtins.late = late
cycle = [GuestMemory.allocate(1 << 20)[0], memory]
cycle.append(cycle)
print("ended")
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
