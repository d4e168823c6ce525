# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""What front-ends and guests get wrong: typed errors with the facts, and nothing left behind."""

import errno
import gc
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guest_memory_support import NAME, SEALED, USER, mapped, memfd, open_fds, region

from guest_memory import (
    MAX_MEM_SLOTS,
    AccessDenied,
    GuestAddress,
    GuestMemory,
    GuestMemoryError,
    InvalidRegion,
    Iotlb,
    IotlbMiss,
    Iova,
    MappingFailed,
    Misaligned,
    MmapMapper,
    NoSuchRegion,
    NotContiguous,
    OutOfBounds,
    Overlap,
    RangeError,
    Region,
    SharedMapping,
    TooManyRegions,
    UsageError,
    UserAddress,
    allocate_memfd,
)

TOP = 1 << 64


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    if mapped():
        gc.collect()  # a caught exception and the frame that caught it refer to each other
    before = open_fds()
    assert mapped() == 0
    yield
    assert open_fds() == before
    if mapped():
        gc.collect()
    assert mapped() == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (region(0x1000, 0), "size"),
        (region(0x1000, -1), "size"),
        (region(0x1000, TOP), "size"),
        (region(TOP - 0x1000, 0x2000, user=0), "guest"),
        (region(TOP, 0x1000, user=0), "guest"),
        (region(-0x1000, 0x1000, user=0), "guest"),
        (region(0, 0x2000, user=TOP - 0x1000), "user"),
        (region(0, 0x2000, TOP - 0x1000), "offset"),
        (region(0, 0x1000, -0x1000), "offset"),
        (region(0, 0x5000), "exceed"),
        (region(0, 0x1000, 0x4000), "exceed"),
        (region(0, 0x2001, 0x2000), "exceed"),
        (region(0, 1, 0x4000), "exceed"),
        (region(0, 0x1000, (1 << 63) - 0x1000), "exceed"),
    ],
)
@pytest.mark.parametrize("seals", [0, SEALED])
def test_regions_that_cannot_be(bad: Region, reason: str, seals: int) -> None:
    with memfd(0x4000, seals) as fd:
        good = region(0x100000, 0x1000)
        memory = GuestMemory.map([(good, fd)])
        for make in (
            lambda: GuestMemory.map([(good, fd), (bad, fd)]),
            lambda: memory.add(bad, fd),
            lambda: MmapMapper().map(bad, fd),
        ):
            with pytest.raises(InvalidRegion, match=reason) as caught:
                make()
            assert (caught.value.address, caught.value.length) == (bad.guest_address, bad.size)
            assert mapped() == 1, "also while the error is still being handled"
        assert memory.read(0x100000, 4) == bytes(4)


def test_a_file_on_disk_has_an_end_too(tmp_path: Any) -> None:
    path = tmp_path / NAME
    path.write_bytes(bytes(0x1800))
    with path.open("r+b") as file:
        memory = GuestMemory.map([(region(0, 0x1800), file.fileno())])
        memory.write(0x17FF, b"!")
        assert not memory.bounded
        with pytest.raises(InvalidRegion, match="exceed"):
            GuestMemory.map([(region(0, 0x1801), file.fileno())])
    assert path.read_bytes()[-1:] == b"!"


def test_a_device_file_reports_no_size() -> None:
    with open("/dev/zero", "r+b", buffering=0) as device:
        mapper = MmapMapper(guarded=True)
        memory = GuestMemory.map([(region(0, 0x4000), device.fileno())], mapper)
        memory.write(0x3FFF, b"!")
        assert memory.read(0x3FFE, 2) == b"\0!"
        with pytest.raises(InvalidRegion, match="offset"):
            mapper.map(region(0, (1 << 63) + 0x1000), device.fileno())
        for size in (1 << 62, (1 << 63) - 0x1000):
            for call in (
                lambda size=size: mapper.map(region(0, size), device.fileno()),
                lambda size=size: GuestMemory.map([(region(0, size), device.fileno())], mapper),
                lambda size=size: memory.add(region(1 << 63, size, user=1 << 63), device.fileno()),
            ):
                with pytest.raises(MappingFailed) as caught:
                    call()
                assert caught.value.errno == errno.ENOMEM


def test_descriptors_that_cannot_be_mapped(tmp_path: Any) -> None:
    ours, theirs = (end.detach() for end in socket.socketpair())
    folder = os.open(tmp_path, os.O_RDONLY)
    path = tmp_path / "read-only"
    path.write_bytes(bytes(0x1000))
    read_only = os.open(path, os.O_RDONLY)
    try:
        for mapper in (MmapMapper(), MmapMapper(guarded=True)):
            for fd, number in (
                (ours, errno.ENODEV),
                (-1, errno.EBADF),
                (read_only, errno.EACCES),
            ):
                with pytest.raises(MappingFailed) as caught:
                    GuestMemory.map([(region(0, 0x1000), fd)], mapper)
                assert caught.value.errno == number
            with pytest.raises((MappingFailed, InvalidRegion)):
                GuestMemory.map([(region(0, 0x1000), folder)], mapper)
            with pytest.raises(InvalidRegion, match="without a file"):
                GuestMemory.map([(region(0, 0x1000), None)], mapper)
        memory = GuestMemory.map([(region(0, 0x1000), read_only)], MmapMapper(read_only=True))
        assert memory.read(0, 4) == bytes(4)
        for attempt in (
            lambda: memory.write(0, b"x"),
            lambda: memory.store(0, 1, 1),
            lambda: memory.view(0, 1),
            lambda: memory.translate(0, 1),
            lambda: memory.copy_from_fd(0, read_only, 1, 0),
            lambda: memory.translate_user(UserAddress(USER), 1),
        ):
            with pytest.raises(AccessDenied) as denied:
                attempt()
            assert denied.value.length == 1
    finally:
        for fd in (ours, theirs, folder, read_only):
            os.close(fd)


def test_a_seal_against_writing_is_the_systems_refusal() -> None:
    with memfd(0x1000, SEALED | 8) as fd, pytest.raises(MappingFailed) as caught:
        GuestMemory.map([(region(0, 0x1000), fd)])
    assert caught.value.errno == errno.EPERM


def test_seals_are_required_only_on_request() -> None:
    mapper = MmapMapper(require_seal=True)
    with memfd(0x1000) as fd:
        assert len(GuestMemory.map([(region(0, 0x1000), fd)])) == 1
        with pytest.raises(InvalidRegion, match="sealed"):
            GuestMemory.map([(region(0, 0x1000), fd)], mapper)
    with memfd(0x1000, 2) as fd:
        assert len(GuestMemory.map([(region(0, 0x1000), fd)], mapper)) == 1


def test_the_510th_region() -> None:
    assert MAX_MEM_SLOTS == 509
    with memfd(0x1000, SEALED) as fd:
        table = [(region(n * 0x2000, 0x1000), fd) for n in range(510)]
        with pytest.raises(TooManyRegions) as caught:
            GuestMemory.map(table)
        assert (caught.value.count, caught.value.limit) == (510, 509)
        assert mapped() == 0
        memory = GuestMemory.map(table[:509])
        with pytest.raises(TooManyRegions):
            memory.add(*table[509])
        assert mapped() == 509
        assert len(memory.remove(table[7][0]).add(*table[509])) == 509
        assert mapped() == 509


@pytest.mark.parametrize(
    ("start", "size"),
    [(0x1000, 0x1000), (0x1FFF, 1), (0xFFF, 2), (0, 0x10000), (0x1800, 0x1000), (0x800, 0x801)],
)
def test_overlaps_in_either_space(start: int, size: int) -> None:
    with memfd(0x20000, SEALED) as fd:
        first = region(0x1000, 0x1000, user=0x1000)
        elsewhere = 1 << 40
        for second, space, named in (
            (region(start, size, user=elsewhere), "guest", start),
            (region(elsewhere, size, user=start), "user", start),
        ):
            memory = GuestMemory.map([(first, fd)])
            with pytest.raises(Overlap) as caught:
                memory.add(second, fd)
            assert (caught.value.address, caught.value.length) == (named, size)
            assert caught.value.space == space
            for table in ([first, second], [second, first]):
                with pytest.raises(Overlap):
                    GuestMemory.map((entry, fd) for entry in table)


def test_removing_what_is_not_there() -> None:
    with memfd(0x4000, SEALED) as fd:
        memory = GuestMemory.map([(region(0x1000, 0x1000), fd)])
        for wrong in (
            region(0x2000, 0x1000),
            region(0, 0x1000),
            region(0x1000, 0x2000),
            region(0x1000, 0x1000, user=0),
        ):
            with pytest.raises(NoSuchRegion) as caught:
                memory.remove(wrong)
            assert caught.value.address == wrong.guest_address
        # Offset, flags and domain are not compared.
        assert len(memory.remove(region(0x1000, 0x1000, 0x3000, flags=2))) == 0


Call = Callable[[GuestMemory, int, int], object]
RANGES: dict[str, Call] = {
    "read": lambda memory, address, length: memory.read(address, length),
    "read_into": lambda memory, address, length: memory.read_into(address, bytearray(length)),
    "write": lambda memory, address, length: memory.write(address, bytes(length)),
    "pieces": lambda memory, address, length: memory.pieces(address, length),
    "segments": lambda memory, address, length: memory.segments(address, length),
    "translate": lambda memory, address, length: memory.translate(address, length),
    "view": lambda memory, address, length: memory.view(address, length),
    "views": lambda memory, address, length: memory.views(address, length),
    "copy_to_fd": lambda memory, address, length: memory.copy_to_fd(address, -1, length, 0),
    "copy_from_fd": lambda memory, address, length: memory.copy_from_fd(address, -1, length, 0),
}


@pytest.mark.parametrize("call", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize(
    ("address", "length"),
    [
        (0, 1),
        (0xFFF, 2),
        (0x2FFF, 2),
        (0x1000, 0x5000),
        (0x3000, 1),
        (0x5FFF, 2),
        (TOP - 1, 2),
        (TOP - 0x1000, 0x1001),
        (TOP, 1),
        (-1, 1),
        (-1, 0x2000),
        (0x1000, 0x10000),
    ],
)
def test_ranges_that_are_not_all_there(call: Call, address: int, length: int) -> None:
    with memfd(0x5000, SEALED) as fd:
        memory = GuestMemory.map(
            [
                (region(0x1000, 0x2000), fd),
                (region(0x5000, 0x1000, 0x2000), fd),
                (region(TOP - 0x1000, 0x1000, 0x3000), fd),
            ]
        )
    with pytest.raises(OutOfBounds) as caught:
        call(memory, address, length)
    assert (caught.value.address, caught.value.length) == (address, length)
    del caught


@pytest.mark.parametrize("call", RANGES.values(), ids=RANGES)
def test_negative_lengths_are_our_own_mistake(call: Call) -> None:
    memory, fd = GuestMemory.allocate(0x1000)
    os.close(fd)
    with pytest.raises((UsageError, ValueError)):
        call(memory, 0, -1)


def test_zero_lengths() -> None:
    memory, fd = GuestMemory.allocate(0x1000, 0x1000)
    nowhere = 0x100000
    assert memory.read(nowhere, 0) == b""
    assert memory.write(nowhere, b"") == 0
    assert memory.read_into(nowhere, bytearray()) == 0
    assert memory.pieces(nowhere, 0) == []
    assert memory.segments(nowhere, 0) == []
    assert memory.views(nowhere, 0) == []
    assert memory.copy_to_fd(nowhere, fd, 0, 0) == memory.copy_from_fd(nowhere, fd, 0, 0) == 0
    assert memory.translate(0x1FFF, 0) == memory.translate(0x1000, 0) + 0xFFF
    assert len(memory.view(0x1800, 0)) == 0
    for call in (memory.translate, memory.view):
        with pytest.raises(OutOfBounds):
            call(0x2000, 0)
    os.close(fd)


def test_ranges_in_two_pieces_have_no_single_address() -> None:
    with memfd(0x2000, SEALED) as fd:
        memory = GuestMemory.map(
            [(region(0x1000, 0x1000, 0x1000), fd), (region(0x2000, 0x1000), fd)]
        )
    calls: tuple[Callable[[], object], ...] = (
        lambda: memory.translate(0x1FF8, 16),
        lambda: memory.view(0x1FF8, 16),
        lambda: memory.translate_user(UserAddress(USER + 0x1FF8), 16),
    )
    for call in calls:
        with pytest.raises(NotContiguous) as caught:
            call()
        assert caught.value.length == 16


def test_user_addresses_that_are_not_there() -> None:
    with memfd(0x1000, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 0x1000, user=TOP - 0x1000), fd)])
    assert memory.user_to_guest(UserAddress(TOP - 1)) == 0xFFF
    for address in (TOP, TOP - 0x1001, 0, -1):
        with pytest.raises(OutOfBounds):
            memory.user_to_guest(UserAddress(address))
    with pytest.raises(OutOfBounds) as caught:
        memory.translate_user(UserAddress(TOP - 8), 9)
    assert (caught.value.address, caught.value.length) == (TOP - 8, 9)
    with pytest.raises(UsageError):
        memory.translate_user(UserAddress(TOP - 8), -9)


@pytest.mark.parametrize("guarded", [False, True])
def test_atomics_that_are_not_aligned(guarded: bool) -> None:
    with memfd(0x3000) as fd:
        memory = GuestMemory.map(
            [(region(0, 0x1000), fd), (region(0x1000, 0x1000, 0x1001), fd)],
            MmapMapper(guarded=guarded),
        )
    for size in (2, 4, 8):
        for offset in range(1, size):
            with pytest.raises(Misaligned) as caught:
                memory.load(0x10 + offset, size)
            assert (caught.value.address, caught.value.length) == (0x10 + offset, size)
            with pytest.raises(Misaligned):
                memory.store(0x10 + offset, size, 1)
        with pytest.raises(Misaligned, match="misaligned"):
            memory.load(0x1000, size)  # the file's offset makes it so
    for size in (0, 3, 16, -1):
        with pytest.raises(UsageError):
            memory.load(0, size)
    for value in (-1, 1 << 16):
        with pytest.raises(UsageError):
            memory.store(0, 2, value)
    with pytest.raises(OutOfBounds):
        memory.load(0x2000, 8)
    with pytest.raises(OutOfBounds):
        memory.store(TOP, 8, 0)


def test_iotlb_says_no() -> None:
    iotlb = Iotlb()
    iotlb.insert(Iova(0x1000), 0x1000, UserAddress(USER), 1)
    iotlb.insert(Iova(0x2000), 0x1000, UserAddress(0xDEAD000), 3)
    memory, fd = GuestMemory.allocate(0x4000, 0)
    os.close(fd)
    memory = memory.with_iotlb(iotlb)
    assert memory.read(0x1000, 4) == bytes(4)
    for call in (
        lambda: memory.write(0x1FFE, b"xx"),
        lambda: memory.store(0x1FFE, 2, 1),
        lambda: memory.view(0x1FFE, 2),
    ):
        with pytest.raises(AccessDenied) as denied:
            call()
        assert (denied.value.address, denied.value.length) == (0x1FFE, 2)
        assert denied.value.access & 2
    with pytest.raises(IotlbMiss) as missed:
        memory.read(0xFFE, 4)
    assert (missed.value.address, missed.value.length, missed.value.access) == (0xFFE, 4, 1)
    with pytest.raises(IotlbMiss) as missed:
        memory.write(0x2FFE, b"four")
    assert (missed.value.address, missed.value.length, missed.value.access) == (0x3000, 2, 2)
    with pytest.raises(OutOfBounds) as caught:  # the entry leads nowhere
        memory.read(0x2004, 4)
    assert (caught.value.address, caught.value.length) == (0x2004, 4)
    for iova, size, user, access in (
        (0, 0, 0, 1),
        (0, TOP, 0, 1),
        (TOP - 1, 2, 0, 1),
        (0, 2, TOP - 1, 1),
        (-1, 1, 0, 1),
    ):
        with pytest.raises(OutOfBounds):
            iotlb.insert(Iova(iova), size, UserAddress(user), access)
    for access in (0, 4, -1):
        with pytest.raises(AccessDenied):
            iotlb.insert(Iova(0), 1, UserAddress(0), access)
    with pytest.raises(UsageError):
        Iotlb(limit=0)


def test_shared_mappings_have_sizes_too() -> None:
    with memfd(0x1000) as fd:
        for size, offset in ((0, 0), (-1, 0), (1, -1), (0x1001, 0), (1, 0x1000), (1 << 63, 0)):
            with pytest.raises(InvalidRegion):
                SharedMapping(fd, size, offset)
        mapping = SharedMapping(fd, 0x1000)
        mapping.close()
        mapping.close()
        assert mapping.closed
        with pytest.raises(UsageError):
            _ = mapping.address
        with pytest.raises(UsageError):
            _ = mapping.view
    with pytest.raises(MappingFailed):
        SharedMapping(-1, 1)
    with pytest.raises(UsageError):
        allocate_memfd(0)
    with pytest.raises(UsageError):
        allocate_memfd(1 << 63)
    with pytest.raises((UsageError, GuestMemoryError)):
        GuestMemory.allocate(0)
    with pytest.raises(InvalidRegion):
        GuestMemory.allocate(0x1000, TOP)


def test_every_error_tells_its_facts() -> None:
    error = OutOfBounds(GuestAddress(0x1234), 0x10)
    assert str(error) == "outside of guest memory: 0x10 bytes at 0x1234"
    assert isinstance(error, RangeError)
    assert str(AccessDenied(1, 2, 3)).endswith("(read and write)")
    assert str(IotlbMiss(1, 2, 1)).endswith("(read)")
    assert "guest" in str(Overlap(1, 2, "guest"))
    assert str(TooManyRegions(510, 509)) == "510 regions, 509 are allowed"
    assert "Cannot allocate" in str(MappingFailed(errno.ENOMEM))


def test_buffers_that_are_none() -> None:
    memory, fd = GuestMemory.allocate(0x1000)
    os.close(fd)
    before = memory.read(0, 16)
    with pytest.raises(TypeError):
        memory.write(0, "text")
    with pytest.raises(BufferError):
        memory.read_into(0, b"constant")
    with pytest.raises(BufferError):
        memory.write(0, memoryview(bytes(16))[::2])
    assert memory.read(0, 16) == before
