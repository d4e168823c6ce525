"""Wrong regions with the real devices: refused before anything is mapped."""

import os
from functools import partial

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress
from vhost_xen import (
    XenAlignmentError,
    XenDomainError,
    XenError,
    XenFileError,
    XenFlagsError,
    XenMapper,
    XenRegionError,
    check_devices,
)

from .foreign import region as frames
from .libxen import FIRST_REFERENCE, PAGE, guest
from .maps import nothing_left
from .report import check, expect


def region(
    flags: int, address: int = 0x10000, size: int = PAGE, domid: int = 1, offset: int = 0
) -> Region:
    """Any region."""
    return Region(GuestAddress(address), size, UserAddress(0x10000), offset, flags, domid)


@check
def wrong_regions() -> None:
    """Flags, domain numbers, alignment, references, offsets, files."""
    domid = guest().domid
    gntdev = os.open("/dev/xen/gntdev", os.O_RDWR | os.O_CLOEXEC)
    privcmd = os.open("/dev/xen/privcmd", os.O_RDWR | os.O_CLOEXEC)
    zero = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    attempts: list[tuple[Region, int | None, type[XenError]]] = [
        (region(3, domid=domid), gntdev, XenFlagsError),
        (region(4, domid=domid), gntdev, XenFlagsError),
        (region(8, domid=domid), gntdev, XenFlagsError),
        (region(1 | 8, domid=domid), privcmd, XenFlagsError),
        (region(1 | 0x100, domid=domid), privcmd, XenFlagsError),
        (region(1 << 31, domid=domid), privcmd, XenFlagsError),
        (region(1, domid=0x7FF0), privcmd, XenDomainError),
        (region(1, domid=0x10000 + domid), privcmd, XenDomainError),
        (region(2, domid=0x10000 + domid), gntdev, XenDomainError),
        (region(1, address=0x10800, domid=domid), privcmd, XenAlignmentError),
        (region(2, address=FIRST_REFERENCE * PAGE + 8, domid=domid), gntdev, XenAlignmentError),
        (region(2, address=1 << 44, domid=domid), gntdev, XenRegionError),
        (region(2, offset=PAGE, domid=domid), gntdev, XenFileError),
        (region(1, domid=domid), None, XenFileError),
        (region(1, domid=domid), gntdev, XenFileError),
        (region(2, domid=domid), privcmd, XenFileError),
        (region(2 | 8, domid=domid), privcmd, XenFileError),
        (region(1, size=1 << 40, domid=domid), zero, XenFileError),
    ]
    with nothing_left():
        for wanted, fd, kind in attempts:
            error = expect(XenError, partial(XenMapper().map, wanted, fd))
            assert type(error) is kind, f"{wanted}: {error!r}"
    for fd in (gntdev, privcmd, zero):
        os.close(fd)


@check
def a_table_with_one_wrong_region() -> None:
    """The regions before the wrong one do not stay mapped."""
    domid = guest().domid
    privcmd = os.open("/dev/xen/privcmd", os.O_RDWR | os.O_CLOEXEC)
    with nothing_left():
        for wrong in (frames(1 << 30, PAGE, domid), frames(512, PAGE, domid)._replace(flags=3)):
            table = [(frames(0, 256 * PAGE, domid), privcmd), (wrong, privcmd)]
            expect(XenError, partial(GuestMemory.map, table, mapper=XenMapper()))
    os.close(privcmd)


@check
def devices_are_found() -> None:
    """The question that the command line asks."""
    check_devices()
