"""Grants of the dom0 to itself: gntalloc on one side, the mapper on the other."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress
from vhost_xen import GrantMapError, XenMapper

from .libxen import PAGE, OwnGrants
from .maps import mapped, nothing_left
from .report import check, expect

GRANT, ON_DEMAND = 2, 2 | 8
MARK = 1 << 63
GNTDEV = "/dev/xen/gntdev"


def region(reference: int, size: int, flags: int, domid: int = 0) -> Region:
    """A region over consecutive references."""
    address = MARK | reference * PAGE
    return Region(GuestAddress(address), size, UserAddress(address & ~MARK), 0, flags, domid)


@check
def at_once_both_ways() -> dict[str, Any]:
    """Each side sees what the other wrote; the mapping goes without a trace."""
    grants = OwnGrants(4)
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        for page, reference in enumerate(grants.references):
            mapping = XenMapper().map(region(reference, PAGE, GRANT), fd)
            host = mapping.host_address
            assert host is not None
            assert (host, host + PAGE, "rw-s") in mapped(GNTDEV)
            grants.memory[page * PAGE : page * PAGE + 5] = b"guest"
            assert ctypes.string_at(host, 5) == b"guest"
            ctypes.memmove(host + 100, b"back-end", 8)
            assert grants.memory[page * PAGE + 100 : page * PAGE + 108] == b"back-end"
            mapping.close()
    os.close(fd)
    grants.close()
    return {"references": grants.references}


@check
def on_demand() -> None:
    """Pages are mapped from pin to unpin and not a moment longer."""
    grants = OwnGrants(1)
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        base = region(grants.references[0], PAGE, ON_DEMAND)
        mapping = XenMapper().map(base, fd)
        assert not mapped(GNTDEV)
        grants.memory[0x800:0x805] = b"pages"
        host, token = mapping.pin(base.guest_address + 0x800, 5, 1)
        ((start, _, permissions),) = mapped(GNTDEV)
        assert (host, permissions) == (start + 0x800, "r--s")
        assert ctypes.string_at(host, 5) == b"pages"
        mapping.unpin(token)
        assert not mapped(GNTDEV)
        mapping.close()
    os.close(fd)
    grants.close()


@check
def guest_memory_on_demand() -> None:
    """GuestMemory's copies pin and unpin by themselves."""
    grants = OwnGrants(1)
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        base = region(grants.references[0], 0x900, ON_DEMAND)
        memory = GuestMemory.map([(base, fd)], mapper=XenMapper())
        memory.write(GuestAddress(base.guest_address + 0x8F0), b"sixteen bytes ok")
        assert grants.memory[0x8F0:0x900] == b"sixteen bytes ok"
        assert memory.read(GuestAddress(base.guest_address + 0x8F0), 16) == b"sixteen bytes ok"
        assert not mapped(GNTDEV)
        del memory
    os.close(fd)
    grants.close()


@check
def revoked() -> None:
    """A grant that was taken back cannot be mapped, at once or on demand."""
    grants = OwnGrants(1)
    reference = grants.references[0]
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    early = XenMapper().map(region(reference, PAGE, ON_DEMAND), fd)
    _, token = early.pin(MARK | reference * PAGE, 8, 3)
    early.unpin(token)
    grants.close()
    with nothing_left():
        attempts: list[Callable[[], object]] = [
            lambda: early.pin(MARK | reference * PAGE, 8, 1),
            lambda: XenMapper().map(region(reference, PAGE, GRANT), fd),
        ]
        for attempt in attempts:
            error = expect(GrantMapError, attempt)
            assert (error.reference, error.domid, error.count) == (reference, 0, 1)
    early.close()
    os.close(fd)
