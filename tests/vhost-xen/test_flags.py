"""The rules of the region's xen mmap flags, domid and addresses."""

import pytest

from guest_memory import GuestAddress, GuestMemoryError, InvalidRegion, Region, UserAddress
from vhost_xen import (
    XenAlignmentError,
    XenDomainError,
    XenError,
    XenFlags,
    XenFlagsError,
    XenRegionError,
    check_region,
)

GRANT_BIT = 1 << 63


def region(
    flags: int, address: int = 0x1000, size: int = 0x1000, domid: int = 1, offset: int = 0
) -> Region:
    return Region(GuestAddress(address), size, UserAddress(0), offset, flags, domid)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (0, XenFlags(0)),
        (1, XenFlags.FOREIGN),
        (2, XenFlags.GRANT),
        (2 | 8, XenFlags.GRANT | XenFlags.NO_ADVANCE_MAP),
        (2 | 0x100, XenFlags.GRANT | XenFlags.NO_ADVANCE_MAP),
        (2 | 8 | 0x100, XenFlags.GRANT | XenFlags.NO_ADVANCE_MAP),
    ],
)
def test_valid_flags(value: int, meaning: XenFlags) -> None:
    assert check_region(region(value)) == meaning


@pytest.mark.parametrize(
    "value",
    [3, 4, 8, 16, 0x100, 1 | 8, 1 | 0x100, 3 | 8, 3 | 0x100, 2 | 4, 2 | 16, 1 << 31, 2 | 1 << 31],
)
def test_every_other_combination_is_refused(value: int) -> None:
    with pytest.raises(XenFlagsError) as caught:
        check_region(region(value))
    assert (caught.value.flags, caught.value.address) == (value, 0x1000)
    assert f"{value:#x}" in str(caught.value)


def test_all_low_values_have_one_meaning() -> None:
    valid = []
    for value in range(1 << 10):
        try:
            check_region(region(value))
        except XenFlagsError:
            continue
        valid.append(value)
    assert valid == [0, 1, 2, 10, 0x102, 0x10A]


@pytest.mark.parametrize("domid", [0x7FF0, 0x7FF1, 0x7FF4, 0xFFFF, 0x10000, 0x10001, 0xFFFFFFFF])
@pytest.mark.parametrize("flags", [1, 2, 10])
def test_domain_numbers_are_never_cut_off(flags: int, domid: int) -> None:
    with pytest.raises(XenDomainError) as caught:
        check_region(region(flags, domid=domid))
    assert caught.value.domid == domid


@pytest.mark.parametrize("domid", [0, 1, 0x7FEF])
@pytest.mark.parametrize("flags", [1, 2, 10])
def test_domain_numbers_of_guests(flags: int, domid: int) -> None:
    assert check_region(region(flags, domid=domid)) == flags


@pytest.mark.parametrize("flags", [1, 2, 10])
@pytest.mark.parametrize("address", [1, 0x800, 0xFFF, 0x1001])
def test_regions_begin_at_a_page(flags: int, address: int) -> None:
    with pytest.raises(XenAlignmentError) as caught:
        check_region(region(flags, address=address))
    assert caught.value.page_size == 4096


def test_references_have_32_bits() -> None:
    last = GRANT_BIT | (0xFFFFFFFF << 12)
    assert check_region(region(2, address=last)) == XenFlags.GRANT
    assert check_region(region(2, address=last, size=1)) == XenFlags.GRANT
    for address, size in ((last, 0x1001), (last + 0x1000, 1), (GRANT_BIT | 1 << 62, 0x1000)):
        with pytest.raises(XenRegionError, match="32 bits"):
            check_region(region(2, address=address, size=size))


def test_frame_numbers_have_40_bits() -> None:
    last = ((1 << 40) - 1) << 12
    assert check_region(region(1, address=last)) == XenFlags.FOREIGN
    for address, size in ((last, 0x1001), (1 << 52, 1), (1 << 62, 0x1000)):
        with pytest.raises(XenRegionError, match="40 bits"):
            check_region(region(1, address=address, size=size))


def test_the_grant_mark_is_optional_for_grants_and_refused_for_frames() -> None:
    assert check_region(region(2, address=0x5000)) == XenFlags.GRANT
    with pytest.raises(XenRegionError, match="grant mark"):
        check_region(region(1, address=GRANT_BIT | 0x5000))


def test_plain_regions_are_not_bound_by_xen_rules() -> None:
    assert check_region(region(0, address=0x123, domid=0xFFFFFFFF)) == 0


@pytest.mark.parametrize("flags", [0, 1, 2, 10])
def test_empty_and_endless_regions(flags: int) -> None:
    for address, size in ((0x1000, 0), ((1 << 64) - 0x1000, 0x1001), (0x1000, 1 << 64)):
        with pytest.raises(InvalidRegion):
            check_region(region(flags, address=address, size=size))


def test_a_wrong_region_is_an_error_of_guest_memory_too() -> None:
    with pytest.raises(XenError) as caught:
        check_region(region(3))
    assert isinstance(caught.value, InvalidRegion)
    assert isinstance(caught.value, GuestMemoryError)
    assert caught.value.reason == "xen mmap flags 0x3 are not valid"
