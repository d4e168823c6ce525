"""Words and bytes at host addresses: atomic operations, and copies that survive a missing page."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest

from guest_memory import (
    MappingFailed,
    atomic_add,
    atomic_flip,
    atomic_or,
    store_halfword,
    try_copy,
)
from guest_memory.linux import atomics, copies

PAGE = mmap.PAGESIZE


@pytest.fixture
def gone() -> Iterator[int]:
    """The host address of two pages, of which the second was truncated."""
    fd = os.memfd_create("truncated")
    os.ftruncate(fd, 2 * PAGE)
    with mmap.mmap(fd, 2 * PAGE) as mapped:
        place = ctypes.c_uint8.from_buffer(mapped)
        os.ftruncate(fd, PAGE)
        os.close(fd)
        yield ctypes.addressof(place)
        del place


def address_of(word: ctypes.c_uint32) -> int:
    return ctypes.addressof(word)


@pytest.mark.parametrize("value", [0, 1, -1, 2047, -2048])
def test_adding_wraps(value: int) -> None:
    word = ctypes.c_uint32(5)
    atomic_add(address_of(word), value)
    assert word.value == (5 + value) & 0xFFFF_FFFF


def test_adding_where_nothing_is_mapped_is_an_error(gone: int) -> None:
    with pytest.raises(MappingFailed):
        atomic_add(gone + PAGE, 1)


@pytest.mark.parametrize("mask", [0, 1, 0x7FF, 0x800, 0x8000_0001, 0xFFFF_F800, 0xFFFF_FFFF])
def test_every_bit_of_a_mask_is_set_and_flipped(mask: int) -> None:
    word = ctypes.c_uint32(0x0F0F_0F0F)
    assert atomic_or(address_of(word), mask)
    assert word.value == 0x0F0F_0F0F | mask
    word.value = 0x0F0F_0F0F
    assert atomic_flip(address_of(word), mask)
    assert word.value == 0x0F0F_0F0F ^ mask


def test_a_missing_page_is_told(gone: int) -> None:
    assert atomic_or(gone + PAGE - 4, 1)
    assert not atomic_or(gone + PAGE, 1)
    assert not atomic_flip(gone + PAGE, 1)
    assert not store_halfword(gone + PAGE + 2, 1)


def seen(monkeypatch: pytest.MonkeyPatch, memory: Any, store: Any) -> list[int]:
    """What the upper halfword was after each atomic step of a store."""
    values: list[int] = []
    step = atomics._word_operation

    def watched(*arguments: Any) -> bool:
        done = step(*arguments)
        values.append(memory[1])
        return done

    with monkeypatch.context() as patch:
        patch.setattr(atomics, "_word_operation", watched)
        assert store()
    return values


def test_an_index_only_moves_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = (ctypes.c_uint16 * 2)(0xBEEF, 0)
    upper = ctypes.addressof(memory) + 2
    for old in (0, 1, 0x7F, 0xFF, 0x1FE, 0x7FFF, 0xFFFE, 0xFFFF):
        for distance in (1, 2, 3, 5, 127, 128, 255, 256, 1000, 32768):
            memory[1], new = old, (old + distance) & 0xFFFF
            values = seen(monkeypatch, memory, lambda new=new: store_halfword(upper, new))
            steps = [(value - old) & 0xFFFF for value in values]
            assert steps == sorted(steps)
            assert steps[-1] == distance
            assert list(memory) == [0xBEEF, new]


def test_the_lower_half_is_stored_without_a_carry() -> None:
    memory = (ctypes.c_uint16 * 2)(0xFFFF, 0xBEEF)
    assert store_halfword(ctypes.addressof(memory), 1)
    assert list(memory) == [1, 0xBEEF]


@pytest.mark.parametrize("pipe", [False, True])
def test_a_copy_tells_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, gone: int, pipe: bool
) -> None:
    monkeypatch.setattr(copies, "_without_process_vm", pipe)
    local = ctypes.create_string_buffer(b"x" * PAGE, PAGE)
    here = ctypes.addressof(local)
    assert try_copy(gone + 8, here, PAGE - 8, True)
    assert ctypes.string_at(gone, PAGE) == bytes(8) + b"x" * (PAGE - 8)
    assert try_copy(gone, here, 100, False)
    assert local.raw[:101] == bytes(8) + b"x" * 93
    assert not try_copy(gone + PAGE - 50, here, 200, False)
    assert not try_copy(gone + PAGE - 50, here, 200, True)
