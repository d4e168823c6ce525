# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""The dirty log: exact, atomic against other processes, and never beyond its bitmap."""

import ctypes
import os
import subprocess
import sys

import pytest
from guest_memory_support import memfd, region, run
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_memory import (
    DirtyLog,
    GuestAddress,
    GuestMemory,
    InvalidRegion,
    OutOfBounds,
    Poisoned,
    SharedMapping,
    UsageError,
    abi,
    allocate_memfd,
)


def mark(log: DirtyLog, address: int, length: int) -> None:
    log.mark(GuestAddress(address), length)


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(
    st.integers(1, 70),
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 600), st.integers(1, 200)), max_size=6),
)
def test_marks_are_exact(size: int, offset: int, ranges: list[tuple[int, int]]) -> None:
    """Any alignment and size of the bitmap; the bytes around it keep their values."""
    with memfd(4096) as fd:
        os.pwrite(fd, b"\xa5" * 128, 0)
        os.pwrite(fd, bytes(size), 16 + offset)
        expected = bytearray(size)
        with DirtyLog(fd, size, 16 + offset) as log:
            for page, count in ranges:
                address, length = (page << 12) + page % 4096, (count << 12) - count
                last = (address + length - 1) >> 12
                if last >= 8 * size:
                    with pytest.raises(OutOfBounds) as caught:
                        mark(log, address, length)
                    assert (caught.value.address, caught.value.length) == (address, length)
                    continue
                mark(log, address, length)
                for bit in range(address >> 12, last + 1):
                    expected[bit // 8] |= 1 << bit % 8
        content = os.pread(fd, 128, 0)
        assert content[16 + offset : 16 + offset + size] == expected
        assert set(content[: 16 + offset] + content[16 + offset + size :]) <= {0xA5}


def test_the_structure() -> None:
    with memfd(4096) as fd, DirtyLog(fd, 100, 8) as log:
        struct = log.struct
        assert ctypes.addressof(struct) == log.struct_address
        assert bytes(struct)[:4] == b"GLOG"
        assert (struct.abi, struct.size, struct.page_shift) == (abi.ABI_VERSION, 48, 12)
        assert (struct.bitmap_size, struct.enabled, log.size) == (100, 0, 100)
        ctypes.c_uint8.from_address(struct.bitmap + 99).value = 0x80
        assert os.pread(fd, 1, 107) == b"\x80"
        log.enabled = True
        assert (struct.enabled, log.enabled) == (1, True)
        log.close()
        assert (struct.enabled, struct.bitmap, struct.bitmap_size) == (0, 0, 0)
        log.close()
        with pytest.raises(UsageError):
            mark(log, 0, 1)
        with pytest.raises(UsageError):
            _ = log.view


def test_ends_of_the_address_space() -> None:
    with memfd(4096) as fd, DirtyLog(fd, 4096) as log:
        mark(log, 0, 0)
        mark(log, 1 << 70, 0)
        for address, length in ((1 << 64, 1), ((1 << 64) - 1, 1), ((1 << 64) - 1, 2), (-1, 1)):
            with pytest.raises(OutOfBounds):
                mark(log, address, length)
        with pytest.raises(UsageError):
            mark(log, 0, -1)
        assert not any(log.view)
        mark(log, (4096 * 8 << 12) - 1, 1)
        assert log.view[-1] == 0x80
        for size, offset in ((0, 0), (4097, 0), (1, 4096)):
            with pytest.raises(InvalidRegion):
                DirtyLog(fd, size, offset)


def test_what_it_covers() -> None:
    with memfd(0x3000) as fd, DirtyLog(fd, 1) as log:
        assert log.covers(GuestMemory())
        assert log.covers(GuestMemory.map([(region(0x5000, 0x3000), fd)]))
        assert not log.covers(
            GuestMemory.map([(region(0x5000, 0x2000), fd), (region(0x8000, 1), fd)])
        )


def test_writes_are_logged_while_it_is_enabled() -> None:
    with memfd(0x4000) as fd, DirtyLog(fd, 64, 0x3000) as log:
        memory = GuestMemory.map([(region(0, 0x3000), fd)]).with_log(log)
        memory.write(0, b"not logged")
        assert not any(log.view)
        log.enabled = True
        memory.write(0xFFF, b"two")
        memory.write(0x2000, b"")
        assert bytes(log.view[:1]) == b"\3"
        memory.store(0x2000, 8, 1)
        assert bytes(log.view[:1]) == b"\7"
        log.view[0] = 0
        memory.store(0x1000, 2, 1)
        assert bytes(log.view[:1]) == b"\2"
        assert memory.copy_from_fd(0, fd, 0x10, 0x4000) == 0, "the file's end"
        assert bytes(log.view[:1]) == b"\2", "nothing was read, nothing is logged"
        log.enabled = False
        memory.write(0, b"x")
        memory.with_log(None).write(0, b"x")
        assert bytes(log.view[:1]) == b"\2"


WRITER = """
import sys
from guest_memory import DirtyLog, GuestAddress
log = DirtyLog(int(sys.argv[1]), 4096)
start, step = int(sys.argv[2]), 2
sys.stdout.write("ready")
sys.stdout.flush()
sys.stdin.read(1)
for page in range(start, 4096 * 8, step):
    log.mark(GuestAddress(page << 12), 1)
"""


def test_two_processes_lose_no_bit() -> None:
    """They set alternate bits of the same bytes at full speed."""
    for _ in range(3):
        with memfd(4096) as fd:
            writers = [
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, str(fd), str(start)],
                    pass_fds=[fd],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                for start in (0, 1)
            ]
            for writer in writers:
                assert writer.stdout is not None
                assert writer.stdout.read(5) == b"ready"
            for writer in writers:
                assert writer.stdin is not None
                writer.stdin.write(b"x")
                writer.stdin.flush()
            for writer in writers:
                writer.communicate()
                assert writer.returncode == 0
            assert os.pread(fd, 4096, 0) == b"\xff" * 4096


CLEARING = """
import ctypes, os, sys
from guest_memory import DirtyLog, GuestAddress
from guest_memory.linux import atomics
fd = os.memfd_create("log")
os.ftruncate(fd, 4096)
child = os.fork()
first = 0 if child else 16  # each process has half of the bits of one word
log = DirtyLog(fd, 4)
address = log.struct.bitmap
word = ctypes.c_uint32.from_address(address)
ours = 0xFFFF << first
for n in range(3000):
    log.mark(GuestAddress(first << 12), 16 << 12)
    if word.value & ours != ours:
        os._exit(1)
    for bit in range(first, first + 16):
        # As a front-end does when it has seen a bit: an atomic AND NOT.
        assert atomics._word_operation(address, 3 | 8, bit)
    if word.value & ours:
        os._exit(2)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_setting_while_others_set_and_clear() -> None:
    result = run(CLEARING)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_bitmap_that_shrinks() -> None:
    with memfd(0x3000) as fd, DirtyLog(fd, 0x3000) as log:
        mark(log, 0, 1)
        os.ftruncate(fd, 0x1000)
        mark(log, 1 << 12, 1)
        with pytest.raises(Poisoned) as caught:
            mark(log, 0x1000 << 15, 1)
        assert (caught.value.address, caught.value.length) == (0x1000 << 15, 1)
        assert os.pread(fd, 1, 0) == b"\3"
        assert log.mapping.poisoned
        assert ctypes.c_uint32.from_address(log.struct.poison).value == 1
        log.close()
        assert log.struct.poison == 0


def test_a_bitmap_whose_missing_pages_a_guard_has_replaced() -> None:
    """Bits that are set in a guard's pages reach nobody."""
    with memfd(0x3000) as fd, DirtyLog(fd, 0x3000, guarded=True) as log:
        assert log.mapping.direct
        mark(log, 0, 1)
        ctypes.c_uint32.from_address(log.struct.poison).value = 1  # what the guard does
        with pytest.raises(Poisoned):
            mark(log, 0, 1)


def test_who_may_touch_a_mapping_directly() -> None:
    sealed = allocate_memfd(0x1000)
    with memfd(0x1000) as unsealed:
        for fd, guarded, direct in (
            (unsealed, False, False),
            (unsealed, True, True),
            (sealed, False, True),
        ):
            mapping = SharedMapping(fd, 0x1000, guarded=guarded)
            assert (mapping.sealed, mapping.direct) == (fd == sealed, direct)
    os.close(sealed)


def test_a_mapping_is_announced_before_it_goes() -> None:
    with memfd(0x3000) as fd:
        mapping = SharedMapping(fd, 100, 0x1FF8)
    base, length = mapping.pages
    assert (base, length) == (mapping.address - 0xFF8, 0x2000)
    assert ctypes.c_uint32.from_address(mapping.poison_address).value == 0
    gone: list[int] = []
    mapping.before_unmapping(lambda: gone.append(ctypes.c_uint8.from_address(base).value))
    view = mapping.view
    mapping.close()
    assert not gone, "a view holds it"
    del view
    assert gone == [0]
    assert not mapping.poisoned
    with pytest.raises(UsageError):
        mapping.poison_address  # noqa: B018
