"""Frames of a guest through privcmd."""

import ctypes
import errno
import os
import time
from typing import Any

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress
from vhost_xen import ForeignMapError, XenMapper, XenRegionError

from .libxen import GUEST_PAGES, PAGE, Guest, guest
from .maps import mapped, nothing_left
from .report import check, expect

FOREIGN = 1
PRIVCMD = "/dev/xen/privcmd"


def region(frame: int, size: int, domid: int) -> Region:
    """A region over consecutive frames."""
    return Region(GuestAddress(frame * PAGE), size, UserAddress(frame * PAGE), 0, FOREIGN, domid)


def refused(wanted: Region, fd: int) -> ForeignMapError:
    """Map what cannot be mapped."""
    return expect(ForeignMapError, lambda: XenMapper().map(wanted, fd))


@check
def whole_guest() -> dict[str, Any]:
    """All of a guest's memory, twice: what is written by one mapping is read by the other."""
    domid = guest().domid
    fd = os.open(PRIVCMD, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        started = time.monotonic()
        first = XenMapper().map(region(0, GUEST_PAGES * PAGE, domid), fd)
        seconds = time.monotonic() - started
        second = XenMapper().map(region(16, PAGE, domid), fd)
        one, two = first.host_address, second.host_address
        assert one is not None
        assert two is not None
        assert (one, one + GUEST_PAGES * PAGE, "rw-s") in mapped(PRIVCMD)
        for page in range(GUEST_PAGES):
            ctypes.c_uint64.from_address(one + page * PAGE).value = page * 0x10001
        assert ctypes.c_uint64.from_address(two).value == 16 * 0x10001
        second.close()
        for page in range(GUEST_PAGES):
            assert ctypes.c_uint64.from_address(one + page * PAGE).value == page * 0x10001
        first.close()
    os.close(fd)
    return {"pages": GUEST_PAGES, "map_seconds": round(seconds, 4)}


@check
def guest_memory() -> None:
    """The same through GuestMemory: copies, words, and a view that outlives the snapshot."""
    domid = guest().domid
    fd = os.open(PRIVCMD, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        memory = GuestMemory.map(
            [(region(0, 64 * PAGE, domid), fd), (region(128, 1000, domid), fd)], mapper=XenMapper()
        )
        memory.write(GuestAddress(3 * PAGE - 4), b"over a page's end")
        assert memory.read(GuestAddress(3 * PAGE - 4), 17) == b"over a page's end"
        memory.store(GuestAddress(128 * PAGE + 8), 4, 0xDEADBEEF)
        assert memory.load(GuestAddress(128 * PAGE + 8), 4) == 0xDEADBEEF
        assert memory.window is not None
        view = memory.view(GuestAddress(3 * PAGE - 4), 17)
        del memory
        assert bytes(view) == b"over a page's end"
        assert mapped(PRIVCMD)
        del view
    os.close(fd)


@check
def holes() -> None:
    """Frames that are not there are named, and the others do not stay mapped."""
    domid = guest().domid
    fd = os.open(PRIVCMD, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        error = refused(region(GUEST_PAGES - 3, 5 * PAGE, domid), fd)
        assert (error.failed, error.count) == (2, 5)
        assert error.failures == ((GUEST_PAGES, errno.EINVAL), (GUEST_PAGES + 1, errno.EINVAL))
        last = (1 << 40) - 1
        assert refused(region(last, PAGE, domid), fd).failures == ((last, errno.EINVAL),)
        # The next one would be cut to 40 bits on its way to the hypervisor: frame 0.
        expect(XenRegionError, lambda: XenMapper().map(region(1 << 40, PAGE, domid), fd))
    os.close(fd)


@check
def unknown_domains() -> None:
    """A domain that does not exist, and the dom0 itself, by its number."""
    fd = os.open(PRIVCMD, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        for domid in (0, 999, 0x7FEF):
            error = refused(region(0, 2 * PAGE, domid), fd)
            assert error.failures == ((0, errno.ESRCH), (1, errno.ESRCH)), error.failures
            assert error.domid == domid
    os.close(fd)


@check
def destroyed_guest() -> None:
    """Mapped frames stay readable when their guest has gone; new ones cannot be mapped."""
    fd = os.open(PRIVCMD, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        victim = Guest()
        mapping = XenMapper().map(region(0, 2 * PAGE, victim.domid), fd)
        host = mapping.host_address
        assert host is not None
        ctypes.memmove(host, b"still here", 10)
        victim.destroy()
        assert ctypes.string_at(host, 10) == b"still here"
        error = refused(region(2, PAGE, victim.domid), fd)
        assert error.failed == 1
        mapping.close()
    os.close(fd)
