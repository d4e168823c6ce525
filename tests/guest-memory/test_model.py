# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""Guest memory against a dictionary of bytes: whatever is done to both, they agree.

Tables are drawn with regions adjacent, apart, at 0 and at the very top of the address space; files
are sealed or not, so that both ways of copying are exercised.
"""

import os
from contextlib import ExitStack
from typing import Any

import pytest
from guest_memory_support import SEALED, memfd
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_memory import (
    AccessDenied,
    DirtyLog,
    GuestAddress,
    GuestMemory,
    Iotlb,
    IotlbMiss,
    Iova,
    MmapMapper,
    OutOfBounds,
    Region,
    UserAddress,
)

TOP = 1 << 64
PAGE = 0x1000
STEADY = settings(derandomize=True, deadline=None, max_examples=100, database=None)

# Sizes that are no multiples of a page, because nothing says that they have to be.
sizes = st.sampled_from([1, 7, 8, 0x800, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 5])
gaps = st.sampled_from([0, 0, 0, 1, 8, PAGE, 1 << 20, 1 << 40])


@st.composite
def tables(draw: Any) -> list[Region]:
    """Regions in guest order; user addresses in an order of their own."""
    layout = draw(st.lists(st.tuples(gaps, sizes), min_size=1, max_size=8))
    total = sum(gap + size for gap, size in layout)
    start = draw(st.sampled_from([0, PAGE, 1 << 32, TOP - total]))
    order = draw(st.permutations(range(len(layout))))
    user = draw(st.sampled_from([0, 1 << 46, TOP - total]))
    users = {}
    for index in order:
        gap, size = layout[index]
        users[index] = user + gap
        user += gap + size
    regions = []
    offset = 0
    for index, (gap, size) in enumerate(layout):
        start += gap
        offset += draw(st.sampled_from([0, 0, PAGE, 24]))
        regions.append(Region(GuestAddress(start), size, UserAddress(users[index]), offset))
        start += size
        offset += size
    return regions


def near(draw: Any, regions: list[Region], space: str = "guest_address") -> tuple[int, int]:
    """An address and a length around the interesting places."""
    region = draw(st.sampled_from(regions))
    base = getattr(region, space) + draw(st.sampled_from([0, region.size]))
    address = base + draw(st.integers(-12, 12) | st.integers(-2 * PAGE, 2 * PAGE))
    return address, draw(st.integers(0, 24) | st.integers(0, 4 * PAGE))


class Model:
    """What guest memory means: a byte for each address, and the page of each byte written."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions
        self.bytes: dict[int, int] = {}
        self.dirty: set[int] = set()

    def region_of(self, address: int) -> Region | None:
        for region in self.regions:
            if region.guest_address <= address < region.guest_end:
                return region
        return None

    def valid(self, address: int, length: int) -> bool:
        while length > 0:
            region = self.region_of(address)
            if region is None:
                return False
            step = min(length, region.guest_end - address)
            address, length = address + step, length - step
        return True

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.bytes.get(address + i, 0) for i in range(length))

    def write(self, address: int, data: bytes) -> None:
        for i, value in enumerate(data):
            self.bytes[address + i] = value
            self.dirty.add((address + i) >> 12)


def opened(stack: ExitStack, regions: list[Region], sealed: bool) -> tuple[GuestMemory, int]:
    size = max(region.mmap_offset + region.size for region in regions)
    fd = stack.enter_context(memfd(size, SEALED if sealed else 0))
    return GuestMemory.map([(region, fd) for region in reversed(regions)]), fd


@STEADY
@given(st.data(), tables(), st.booleans(), st.booleans())
def test_reads_and_writes(data: Any, regions: list[Region], sealed: bool, postcopy: bool) -> None:
    with ExitStack() as stack:
        memory, _ = opened(stack, regions, sealed)
        memory = memory.with_postcopy(postcopy)
        model = Model(regions)
        for _ in range(data.draw(st.integers(1, 12))):
            address, length = near(data.draw, regions)
            if data.draw(st.booleans()):
                content = data.draw(st.binary(min_size=1, max_size=9))
                content *= length // len(content) + 1
                content = content[:length]
                if model.valid(address, length):
                    model.write(address, content)
                    assert memory.write(address, content) == length
                else:
                    with pytest.raises(OutOfBounds) as caught:
                        memory.write(address, content)
                    assert (caught.value.address, caught.value.length) == (address, length)
            elif model.valid(address, length):
                buffer = bytearray(length)
                assert memory.read_into(address, buffer) == length
                assert memory.read(address, length) == buffer == model.read(address, length)
            else:
                with pytest.raises(OutOfBounds) as caught:
                    memory.read(address, length)
                assert (caught.value.address, caught.value.length) == (address, length)
        for region in regions:
            assert memory.read(region.guest_address, region.size) == model.read(
                region.guest_address, region.size
            )


@STEADY
@given(st.data(), tables())
def test_pieces_cover_the_range_in_order(data: Any, regions: list[Region]) -> None:
    with ExitStack() as stack:
        memory, _ = opened(stack, regions, True)
        model = Model(regions)
        hosts = dict(zip(memory.regions, memory.host_addresses, strict=True))
        for _ in range(8):
            address, length = near(data.draw, regions)
            if not model.valid(address, length):
                with pytest.raises(OutOfBounds):
                    memory.pieces(address, length)
                continue
            position = address
            for segment, piece in zip(
                memory.segments(address, length), memory.pieces(address, length), strict=True
            ):
                assert (segment.host, segment.length) == piece
                assert segment.guest == position
                region = model.region_of(position)
                assert region is not None
                assert segment.length > 0
                assert position + segment.length <= region.guest_end
                host = hosts[region]
                assert host is not None
                assert segment.host == host + position - region.guest_address
                position += segment.length
            assert position == address + length


@STEADY
@given(st.data(), tables())
def test_user_addresses(data: Any, regions: list[Region]) -> None:
    with ExitStack() as stack:
        memory, _ = opened(stack, regions, True)
        for _ in range(8):
            user, length = near(data.draw, regions, "user_address")
            holder = [r for r in regions if r.user_address <= user < r.user_end]
            if not holder:
                with pytest.raises(OutOfBounds):
                    memory.user_to_guest(UserAddress(user))
                continue
            guest = holder[0].guest_address + user - holder[0].user_address
            assert memory.user_to_guest(UserAddress(user)) == guest
            if user + length <= holder[0].user_end:
                host = memory.translate_user(UserAddress(user), length)
                assert host == memory.translate(guest, length)
            else:
                with pytest.raises(OutOfBounds):  # also when it is valid, but not in one piece
                    memory.translate_user(UserAddress(user), length)


@STEADY
@given(st.data(), tables(), st.booleans())
def test_words(data: Any, regions: list[Region], guarded: bool) -> None:
    with ExitStack() as stack:
        size = max(region.mmap_offset + region.size for region in regions)
        fd = stack.enter_context(memfd(size))
        memory = GuestMemory.map([(r, fd) for r in regions], MmapMapper(guarded=guarded))
        model = Model(regions)
        for _ in range(8):
            address, _ = near(data.draw, regions)
            width = data.draw(st.sampled_from([1, 2, 4, 8]))
            address &= -width
            region = model.region_of(address)
            if (
                region is None
                or address + width > region.guest_end
                or (address - region.guest_address + region.mmap_offset) % width
            ):
                continue
            value = data.draw(st.integers(0, (1 << 8 * width) - 1))
            memory.store(address, width, value)
            model.write(address, value.to_bytes(width, "little"))
            assert memory.load(address, width) == value
        for region in regions:
            assert memory.read(region.guest_address, region.size) == model.read(
                region.guest_address, region.size
            )


@STEADY
@given(st.data(), tables(), st.booleans())
def test_the_log_has_exactly_the_pages_written(
    data: Any, regions: list[Region], sealed: bool
) -> None:
    if regions[-1].guest_end > 1 << 44:  # a bitmap for more would be larger than this machine
        regions = [r._replace(guest_address=GuestAddress(r.guest_address >> 30)) for r in regions]
        regions = [
            r
            for i, r in enumerate(regions)
            if all(
                r.guest_address >= o.guest_end or o.guest_address >= r.guest_end
                for o in regions[:i]
            )
        ]
    with ExitStack() as stack:
        memory, file = opened(stack, regions, sealed)
        bitmap_size = ((regions[-1].guest_end - 1) >> 15) + 1
        log_file = stack.enter_context(memfd(bitmap_size + 5))
        log = stack.enter_context(DirtyLog(log_file, bitmap_size, 5, enabled=True))
        assert log.covers(memory)
        memory = memory.with_log(log)
        model = Model(regions)
        for _ in range(8):
            address, length = near(data.draw, regions)
            length = min(length, PAGE + 9)
            if not model.valid(address, length):
                continue
            if data.draw(st.booleans()):
                memory.write(address, bytes(length))
                model.write(address, bytes(length))
            else:
                done = memory.copy_from_fd(address, file, length, 0)
                model.write(address, bytes(done))
        expected: dict[int, int] = {}
        for page in model.dirty:
            expected[page // 8] = expected.get(page // 8, 0) | 1 << page % 8
        view = log.view
        assert {i: view[i] for i in _data_bytes(log_file, 5, view) if view[i]} == expected


def _data_bytes(fd: int, offset: int, view: memoryview) -> list[int]:
    """Indices that a sparse bitmap can have set bits at: those whose pages are there."""
    result: list[int] = []
    position = 0
    end = os.fstat(fd).st_size
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            break
        position = os.lseek(fd, start, os.SEEK_HOLE)
        result += [i - offset for i in range(start, position) if 0 <= i - offset < len(view)]
    return result


@STEADY
@given(st.data(), tables())
def test_adding_and_removing_is_the_same_as_mapping_at_once(
    data: Any, regions: list[Region]
) -> None:
    with ExitStack() as stack:
        whole, fd = opened(stack, regions, True)
        memory = GuestMemory()
        for region in data.draw(st.permutations(regions)):
            memory = memory.add(region, fd)
        assert memory.regions == whole.regions
        for index, region in enumerate(regions):
            whole.write(region.guest_address, bytes([index + 1]))
        for index, region in enumerate(regions):
            assert memory.read(region.guest_address, 1) == bytes([index + 1])
        left = data.draw(st.permutations(regions))
        while left:
            memory = memory.remove(left.pop())
            assert memory.regions == tuple(sorted(left))
            for region in regions:
                if region in left:
                    memory.read(region.guest_address, region.size)
                else:
                    with pytest.raises(OutOfBounds):
                        memory.read(region.guest_address, 1)


class IotlbModel:
    """One (user address, access) for each byte of a small space."""

    def __init__(self) -> None:
        self.bytes: dict[int, tuple[int, int]] = {}

    def insert(self, iova: int, size: int, user: int, access: int) -> None:
        for i in range(size):
            self.bytes[iova + i] = (user + i, access)

    def invalidate(self, iova: int, size: int) -> None:
        for key in [key for key in self.bytes if iova <= key < iova + size]:
            del self.bytes[key]


@STEADY
@given(st.data(), st.sampled_from([0, TOP - 64]))
def test_iotlb(data: Any, base: int) -> None:
    iotlb, model = Iotlb(), IotlbModel()
    for _ in range(data.draw(st.integers(1, 25))):
        iova = base + data.draw(st.integers(0, 63))
        size = data.draw(st.integers(1, 64))
        access = data.draw(st.integers(1, 3))
        action = data.draw(st.sampled_from(["insert", "insert", "invalidate", "lookup"]))
        if action == "insert":
            size = min(size, TOP - iova)
            user = data.draw(st.sampled_from([0, 1 << 30, iova, TOP - 64]))
            size = min(size, TOP - user)
            iotlb.insert(Iova(iova), size, UserAddress(user), access)
            model.insert(iova, size, user, access)
        elif action == "invalidate":
            iotlb.invalidate(Iova(iova), size)
            model.invalidate(iova, size)
        elif iova + size > TOP:
            with pytest.raises(OutOfBounds):
                iotlb.lookup(Iova(iova), size, access)
        else:
            _check_lookup(iotlb, model, iova, size, access)
        starts = [entry.iova for entry in iotlb.entries]
        assert starts == sorted(starts)
        ends = [entry.iova + entry.size for entry in iotlb.entries]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
        assert sum(entry.size for entry in iotlb.entries) == len(model.bytes)
        assert len(iotlb) == len(starts)


def _check_lookup(iotlb: Iotlb, model: IotlbModel, iova: int, size: int, access: int) -> None:
    for i in range(size):
        entry = model.bytes.get(iova + i)
        if entry is None:
            with pytest.raises(IotlbMiss) as missed:
                iotlb.lookup(Iova(iova), size, access)
            assert (missed.value.address, missed.value.length) == (iova + i, size - i)
            return
        if access & ~entry[1]:
            with pytest.raises(AccessDenied):
                iotlb.lookup(Iova(iova), size, access)
            return
    pieces = iotlb.lookup(Iova(iova), size, access)
    flat = [user + i for user, length in pieces for i in range(length)]
    assert flat == [model.bytes[iova + i][0] for i in range(size)]


@STEADY
@given(st.data(), tables())
def test_memory_behind_an_iotlb(data: Any, regions: list[Region]) -> None:
    """Reads through random translations see the bytes that the user addresses stand for."""
    with ExitStack() as stack:
        memory, _ = opened(stack, regions, True)
        for region in regions:
            pattern = bytes((region.guest_address + i * 7) & 0xFF for i in range(region.size))
            memory.write(region.guest_address, pattern)
        iotlb, model = Iotlb(), IotlbModel()
        for _ in range(data.draw(st.integers(1, 6))):
            region = data.draw(st.sampled_from(regions))
            offset = data.draw(st.integers(0, region.size - 1))
            size = data.draw(st.integers(1, min(region.size - offset, 64)))
            iova = data.draw(st.integers(0, 128))
            user = UserAddress(region.user_address + offset)
            iotlb.insert(Iova(iova), size, user, 1)
            model.insert(iova, size, user, 1)
        translated = memory.with_iotlb(iotlb)
        for _ in range(6):
            iova, size = data.draw(st.integers(0, 160)), data.draw(st.integers(1, 64))
            if any(iova + i not in model.bytes for i in range(size)):
                with pytest.raises(IotlbMiss):
                    translated.read(iova, size)
                continue
            expected = b"".join(
                memory.read(memory.user_to_guest(UserAddress(model.bytes[iova + i][0])), 1)
                for i in range(size)
            )
            assert translated.read(iova, size) == expected
