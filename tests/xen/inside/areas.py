"""Pages that one side grants and the other maps, whoever grants them."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

from guest_memory import GuestAddress, GuestMemory, Mapping, Region, UserAddress
from vhost_xen import XenMapper

from .foreign import region as frames
from .libxen import FIRST_REFERENCE, PAGE, OwnGrants, guest

GRANT, ON_DEMAND = 2, 2 | 8
MARK = 1 << 63
_USER = 0x7000_0000_0000  # user addresses differ from guest addresses, as a real front-end's do


class Area(NamedTuple):
    """Consecutive references, and where the granting side has their pages."""

    reference: int
    pages: int
    host: int

    @property
    def guest_address(self) -> GuestAddress:
        """Where a driver with the grant DMA mark says that the area is."""
        return GuestAddress(MARK | self.reference * PAGE)

    @property
    def user_address(self) -> UserAddress:
        """Where the front-end says that it has the area."""
        return UserAddress(_USER + self.reference * PAGE)


class Granter(Protocol):
    """A domain that grants pages."""

    domid: int

    def area(self, pages: int) -> Area:
        """Grant that many pages."""

    def revoke(self, reference: int) -> None:
        """Take one page back; not every granter can."""


class GuestGranter:
    """The guest that never runs: its frames are written through a foreign mapping."""

    def __init__(self, base: int) -> None:
        self.domid = guest().domid
        self.base = base
        self._frame = 3000
        self._reference = FIRST_REFERENCE + 1200
        self.granted: list[int] = []

    def area(self, pages: int) -> Area:
        """Grant the next frames; references and frames are in one order but unlike each other."""
        first = self._reference
        for page in range(pages):
            guest().grant(first + page, self._frame + page)
            self.granted.append(first + page)
        area = Area(first, pages, self.base + self._frame * PAGE)
        self._frame += pages + 1
        self._reference += pages + 3
        return area

    def revoke(self, reference: int) -> None:
        """Take one page back."""
        guest().revoke(reference)


class OwnGranter:
    """This domain, by gntalloc: each area is cut from a run of ascending references."""

    domid = 0

    def __init__(self, grants: OwnGrants) -> None:
        self._references = grants.references
        self._address = grants.address
        self._next = 0

    def area(self, pages: int) -> Area:
        """Take the first pages from here on whose references follow each other."""
        for start in range(self._next, len(self._references) - pages + 1):
            first = self._references[start]
            if self._references[start : start + pages] == list(range(first, first + pages)):
                self._next = start + pages
                return Area(first, pages, self._address + start * PAGE)
        raise AssertionError(f"no {pages} consecutive references in {self._references}")

    def revoke(self, reference: int) -> None:
        """gntalloc gives all or nothing."""
        raise NotImplementedError


@contextmanager
def guest_granter() -> Iterator[GuestGranter]:
    """The guest, with its memory mapped for the driver's side."""
    with ExitStack() as stack:
        fd = os.open("/dev/xen/privcmd", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        mapping = XenMapper().map(frames(0, 4096 * PAGE, guest().domid), fd)
        stack.callback(mapping.close)
        assert mapping.host_address is not None
        granter = GuestGranter(mapping.host_address)
        yield granter
        assert guest().busy(granter.granted) == []


@contextmanager
def own_granter() -> Iterator[OwnGranter]:
    """This domain, granting to itself."""
    grants = OwnGrants(96)
    try:
        yield OwnGranter(grants)
    finally:
        grants.close()


class _There:
    """A mapping of pages that the driver's side has anyway."""

    page_size = PAGE
    poisoned = False

    def __init__(self, region: Region, host: int) -> None:
        self.host_address = host
        self.size = region.size
        self._start = region.guest_address

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        return self.host_address + address - self._start, None

    def unpin(self, token: Any) -> None:
        pass

    def close(self) -> None:
        pass


class _DriversSide:
    """Maps regions to where the driver's side has them."""

    def __init__(self, hosts: dict[Region, int]) -> None:
        self._hosts = hosts

    def map(self, region: Region, fd: int | None) -> Mapping:
        return _There(region, self._hosts[region])


def memory_at(hosts: dict[Region, int]) -> GuestMemory:
    """Regions as the driver sees them, each at an address of this process."""
    return GuestMemory.map([(region, None) for region in hosts], mapper=_DriversSide(hosts))


def drivers_memory(areas: list[Area]) -> GuestMemory:
    """The areas as the driver sees them."""
    return memory_at(
        {
            Region(area.guest_address, area.pages * PAGE, area.user_address): area.host
            for area in areas
        }
    )


class KeepingMapper:
    """A XenMapper whose mappings can be asked for, to pin what an engine needs."""

    def __init__(self) -> None:
        self._mapper = XenMapper()
        self._mappings: list[tuple[Region, Mapping]] = []

    def map(self, region: Region, fd: int | None) -> Mapping:
        mapping = self._mapper.map(region, fd)
        self._mappings.append((region, mapping))
        return mapping

    def find(self, address: int) -> tuple[Region, Mapping]:
        """The region that an address lies in."""
        for region, mapping in self._mappings:
            if region.guest_address <= address < region.guest_end:
                return region, mapping
        raise AssertionError(f"{address:#x} is in no region")


def regions_of(areas: list[Area], on_demand: list[Area], domid: int) -> list[Region]:
    """The table that a front-end would send."""
    flagged = [(area, GRANT) for area in areas] + [(area, ON_DEMAND) for area in on_demand]
    return [
        Region(area.guest_address, area.pages * PAGE, area.user_address, 0, flags, domid)
        for area, flags in flagged
    ]
