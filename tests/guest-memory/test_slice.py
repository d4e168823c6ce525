# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""The first things a program does: make memory, find things in it, change it, lose it."""

import ctypes
import os

import pytest

from guest_memory import (
    Access,
    GuestAddress,
    GuestMemory,
    MemoryHolder,
    MmapMapper,
    OutOfBounds,
    Overlap,
    Region,
    SharedMapping,
    Unguarded,
    UserAddress,
    allocate_memfd,
)


def test_words_and_bytes_come_back() -> None:
    memory, fd = GuestMemory.allocate(0x10000, 0x1000)
    try:
        assert memory.write(0x1FFE, b"across") == 6
        assert memory.read(0x1FFE, 6) == b"across"
        memory.store(0x2008, 8, 0x0123456789ABCDEF)
        assert [memory.load(0x2008, size) for size in (1, 2, 4, 8)] == [
            0xEF,
            0xCDEF,
            0x89ABCDEF,
            0x0123456789ABCDEF,
        ]
        assert os.pread(fd, 8, 0x1008) == (0x0123456789ABCDEF).to_bytes(8, "little")
    finally:
        os.close(fd)


def test_the_window_shows_what_is_written() -> None:
    memory, fd = GuestMemory.allocate(0x4000, 0x100000)
    os.close(fd)
    window = memory.window
    assert window is not None
    assert window.format == "B"
    assert not window.readonly
    offset = memory.translate(0x100010, 4) - memory.window_base
    window[offset : offset + 4] = b"text"
    assert memory.read(0x100010, 4) == b"text"


def test_regions_come_and_go_and_share_the_window() -> None:
    fd = allocate_memfd(0x3000)
    first = Region(GuestAddress(0x1000), 0x1000, UserAddress(0x7000))
    second = Region(GuestAddress(0x2000), 0x1000, UserAddress(0x9000), 0x2000)
    memory = GuestMemory.map([(first, fd)])
    both = memory.add(second, fd)
    os.close(fd)
    assert both.regions == (first, second)
    assert both.window_base == memory.window_base
    assert both.translate(0x1000, 1) == memory.translate(0x1000, 1)
    both.write(0x1FFC, b"spanning")
    assert len(both.pieces(0x1FFC, 8, Access.READ)) == 2
    assert both.user_to_guest(UserAddress(0x9004)) == 0x2004
    assert both.translate_user(UserAddress(0x9004), 4) == both.translate(0x2004, 4)
    rest = both.remove(first)
    assert rest.regions == (second,)
    with pytest.raises(OutOfBounds) as caught:
        rest.read(0x1FFC, 8)
    assert (caught.value.address, caught.value.length) == (0x1FFC, 8)
    assert both.read(0x1FFC, 8) == b"spanning"
    with pytest.raises(Overlap):
        both.remove(first).add(second, None)


def test_an_unsealed_file_is_copied_and_never_viewed_without_a_guard() -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 0x2000)
    region = Region(GuestAddress(0), 0x2000, UserAddress(0x10000))
    memory = GuestMemory.map([(region, fd)])
    guarded = GuestMemory.map([(region, fd)], MmapMapper(guarded=True))
    os.close(fd)
    assert memory.window is None
    memory.write(0, b"copied")
    memory.store(8, 2, 0xFFEE)
    assert guarded.read(0, 6) == b"copied"
    assert memory.load(8, 2) == guarded.load(8, 2) == 0xFFEE
    with pytest.raises(Unguarded):
        memory.view(0, 6)
    assert bytes(guarded.view(0, 6)) == b"copied"
    assert guarded.window is not None


def test_holder_swaps() -> None:
    holder = MemoryHolder()
    assert len(holder.current) == 0
    memory, fd = GuestMemory.allocate(4096)
    os.close(fd)
    assert len(holder.replace(memory)) == 0
    assert holder.current is memory


def test_shared_mapping() -> None:
    fd = allocate_memfd(0x2000)
    with SharedMapping(fd, 16, 0x1008) as mapping:
        mapping.view[:4] = b"abcd"
        assert ctypes.string_at(mapping.address, 4) == b"abcd"
    assert os.pread(fd, 4, 0x1008) == b"abcd"
    os.close(fd)
