"""The calls themselves, as far as they go without Xen: on a memfd."""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator

import pytest

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress
from vhost_xen import LinuxCalls, SystemCalls, XenFlagsError, XenMapper, XenUnavailable
from vhost_xen import check_devices as check

PAGE = mmap.PAGESIZE


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("calls", os.MFD_CLOEXEC)
    os.truncate(fd, 4 * PAGE)
    os.pwrite(fd, b"second page", PAGE)
    yield fd
    os.close(fd)


def test_mappings_show_the_file_where_they_are_told_to(memfd: int) -> None:
    calls: SystemCalls = LinuxCalls()
    assert calls.page_size == PAGE
    anywhere = calls.mmap(0, 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, memfd, 0)
    assert ctypes.string_at(anywhere + PAGE, 11) == b"second page"
    ctypes.memmove(anywhere, b"shared", 6)
    assert os.pread(memfd, 6, 0) == b"shared"
    assert calls.mmap(anywhere, PAGE, mmap.PROT_READ, memfd, PAGE) == anywhere
    assert ctypes.string_at(anywhere, 11) == b"second page"
    calls.munmap(anywhere, 2 * PAGE)


def test_failures_carry_their_errno(memfd: int) -> None:
    calls = LinuxCalls()
    with pytest.raises(OSError, match="Bad file") as caught:
        calls.mmap(0, PAGE, mmap.PROT_READ, -1, 0)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError, match="Invalid") as caught:
        calls.munmap(1, PAGE)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="Inappropriate") as caught:
        calls.ioctl(memfd, 0x205004, ctypes.create_string_buffer(32))
    assert caught.value.errno == errno.ENOTTY


def test_an_ioctl_that_works_writes_its_argument() -> None:
    calls = LinuxCalls()
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    argument = ctypes.create_string_buffer(4)
    calls.ioctl(reader, 0x541B, argument)  # FIONREAD
    assert int.from_bytes(argument.raw, sys.byteorder) == 3
    os.close(reader)
    os.close(writer)


def test_duplicates_are_not_inherited(memfd: int) -> None:
    calls = LinuxCalls()
    own = calls.duplicate(memfd)
    assert own != memfd
    assert not os.get_inheritable(own)
    calls.close(own)
    assert not calls.is_character_device(memfd)
    with open("/dev/null", "rb") as null:
        assert calls.is_character_device(null.fileno())


def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    for attempt in (XenMapper, LinuxCalls, check):
        with pytest.raises(XenUnavailable, match="Linux"):
            attempt()


def test_plain_regions_go_into_the_window() -> None:
    memory, fd = GuestMemory.allocate(1 << 20, mapper=XenMapper())
    assert memory.window is not None
    memory.write(GuestAddress(5), b"plain")
    assert os.pread(fd, 5, 5) == b"plain"
    os.close(fd)


def test_a_wrong_region_takes_the_table_down(memfd: int) -> None:
    table = [
        (Region(GuestAddress(0), PAGE, UserAddress(0)), memfd),
        (Region(GuestAddress(PAGE), PAGE, UserAddress(PAGE), flags=3, domid=1), memfd),
    ]
    with pytest.raises(XenFlagsError):
        GuestMemory.map(table, mapper=XenMapper())
    with open("/proc/self/maps") as maps:
        assert "memfd:calls" not in maps.read()
