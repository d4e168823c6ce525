"""Grants of a guest: what its grant table says while they are mapped and after."""

import ctypes
import errno
import os
import time
from functools import partial
from typing import Any

from guest_memory import GuestAddress, Region, UserAddress
from vhost_xen import GrantMapError, XenMapper

from .foreign import region as frames
from .libxen import FIRST_REFERENCE, PAGE, READING, WRITING, guest
from .maps import mapped, nothing_left
from .report import check, expect

GRANT, ON_DEMAND = 2, 2 | 8
MARK = 1 << 63
GNTDEV = "/dev/xen/gntdev"
MANY = 1024


def region(reference: int, size: int, flags: int, domid: int) -> Region:
    """A region over consecutive references of a domain."""
    address = MARK | reference * PAGE
    return Region(GuestAddress(address), size, UserAddress(address & ~MARK), 0, flags, domid)


def refused(wanted: Region, fd: int) -> GrantMapError:
    """Map at once what cannot be mapped."""
    return expect(GrantMapError, lambda: XenMapper().map(wanted, fd))


@check
def many_in_one_call() -> dict[str, Any]:
    """1,024 grants: the frames in the order of their references, and none busy afterwards."""
    who = guest()
    references = range(FIRST_REFERENCE, FIRST_REFERENCE + MANY)
    for reference in references:
        who.grant(reference, 2048 - reference)  # any order but the frames' own
    privcmd = os.open("/dev/xen/privcmd", os.O_RDWR | os.O_CLOEXEC)
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    everything = XenMapper().map(frames(0, 2048 * PAGE, who.domid), privcmd)
    base = everything.host_address
    assert base is not None
    for frame in range(2048):
        ctypes.c_uint64.from_address(base + frame * PAGE).value = frame ^ 0xABCDEF
    with nothing_left():
        started = time.monotonic()
        mapping = XenMapper().map(region(FIRST_REFERENCE, MANY * PAGE, GRANT, who.domid), fd)
        seconds = time.monotonic() - started
        host = mapping.host_address
        assert host is not None
        assert who.busy(references) == list(references)
        assert who.flags(FIRST_REFERENCE) & (READING | WRITING) == READING | WRITING
        for position, reference in enumerate(references):
            value = ctypes.c_uint64.from_address(host + position * PAGE).value
            assert value == (2048 - reference) ^ 0xABCDEF
        ctypes.memmove(host + 7 * PAGE + 50, b"from the back-end", 17)
        frame = 2048 - (FIRST_REFERENCE + 7)
        assert ctypes.string_at(base + frame * PAGE + 50, 17) == b"from the back-end"
        mapping.close()
        assert who.busy(references) == []
    everything.close()
    os.close(fd)
    os.close(privcmd)
    return {"pages": MANY, "map_seconds": round(seconds, 4)}


@check
def on_demand() -> dict[str, Any]:
    """Only the touched pages are busy, for reading only when only read, and only while pinned."""
    who = guest()
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    first = FIRST_REFERENCE
    everything = range(first, first + MANY)
    with nothing_left():
        base = region(first, MANY * PAGE, ON_DEMAND, who.domid)
        mapping = XenMapper().map(base, fd)
        assert who.busy(everything) == []
        _, one = mapping.pin(base.guest_address + 10 * PAGE + 4090, 10, 1)
        assert who.busy(everything) == [first + 10, first + 11]
        assert who.flags(first + 10) & (READING | WRITING) == READING
        _, two = mapping.pin(base.guest_address + 11 * PAGE, PAGE, 2)
        assert who.flags(first + 11) & WRITING
        mapping.unpin(one)
        assert who.busy(everything) == [first + 11]
        mapping.close()  # what is pinned stays
        assert who.busy(everything) == [first + 11]
        mapping.unpin(two)
        assert who.busy(everything) == []
        mapping = XenMapper().map(base, fd)
        rounds = 100
        started = time.monotonic()
        for _ in range(rounds):
            mapping.unpin(mapping.pin(base.guest_address, 512, 1)[1])
        seconds = time.monotonic() - started
        mapping.close()
    os.close(fd)
    return {"pin_and_unpin_ms": round(seconds / rounds * 1e3, 3)}


@check
def read_only_grants() -> None:
    """A page that was granted for reading: readable on demand, never writable, never at once."""
    who = guest()
    reference = FIRST_REFERENCE + MANY
    who.grant(reference, 5, read_only=True)
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        base = region(reference, PAGE, ON_DEMAND, who.domid)
        mapping = XenMapper().map(base, fd)
        _, token = mapping.pin(base.guest_address, 8, 1)
        assert who.busy([reference])
        mapping.unpin(token)
        for access in (2, 3):
            error = expect(GrantMapError, partial(mapping.pin, base.guest_address, 8, access))
            assert (error.writable, error.errno, error.call) == (True, errno.EINVAL, "mmap")
        assert who.busy([reference]) == []
        mapping.close()
        assert refused(region(reference, PAGE, GRANT, who.domid), fd).reference == reference
        assert who.busy([reference]) == []
    who.revoke(reference)
    os.close(fd)


@check
def one_bad_reference_among_many() -> None:
    """All or nothing: the good ones of the same request do not stay mapped."""
    who = guest()
    first = FIRST_REFERENCE
    references = range(first, first + 16)
    who.revoke(first + 9)
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        error = refused(region(first, 16 * PAGE, GRANT, who.domid), fd)
        assert (error.reference, error.count, error.domid) == (first, 16, who.domid)
        assert (error.errno, error.call) == (errno.EINVAL, "mmap")
        assert who.busy(references) == []
        base = region(first, 16 * PAGE, ON_DEMAND, who.domid)
        mapping = XenMapper().map(base, fd)
        # A request that touches the bad page fails; one beside it does not.
        error = expect(
            GrantMapError, lambda: mapping.pin(base.guest_address + 8 * PAGE, 2 * PAGE, 1)
        )
        assert (error.reference, error.count) == (first + 8, 2)
        assert who.busy(references) == []
        _, token = mapping.pin(base.guest_address + 8 * PAGE, PAGE, 1)
        assert who.busy(references) == [first + 8]
        mapping.unpin(token)
        mapping.close()
    who.grant(first + 9, 2048 - (first + 9))
    os.close(fd)


@check
def never_given() -> None:
    """References without an entry, beyond the table, for somebody else, of nobody."""
    who = guest()
    to_another = FIRST_REFERENCE + MANY + 1
    who.grant(to_another, 5, to=7)
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        for reference, domid in (
            (FIRST_REFERENCE + MANY + 2, who.domid),
            (0xFFFFFFFF, who.domid),
            (to_another, who.domid),
            (FIRST_REFERENCE, 999),
        ):
            error = refused(region(reference, PAGE, GRANT, domid), fd)
            assert (error.reference, error.domid) == (reference, domid)
        assert who.busy(range(FIRST_REFERENCE, to_another + 1)) == []
    who.revoke(to_another)
    os.close(fd)
    assert not mapped(GNTDEV)


@check
def many_rounds() -> dict[str, Any]:
    """What the kernel and the hypervisor keep for a mapping is given back: no limit is reached."""
    who = guest()
    fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    rounds = 40
    with nothing_left():
        for _ in range(rounds):
            mapping = XenMapper().map(region(FIRST_REFERENCE, MANY * PAGE, GRANT, who.domid), fd)
            mapping.close()
    assert who.busy(range(FIRST_REFERENCE, FIRST_REFERENCE + MANY)) == []
    os.close(fd)
    return {"rounds": rounds, "pages": rounds * MANY}
