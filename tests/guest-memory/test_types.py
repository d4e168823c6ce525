"""What a type checker must see: addresses of three kinds that cannot be mixed up.

Each ``type: ignore`` here is a mistake that has to be one: mypy reports those that are not needed.
"""

import os
from typing import assert_type

import pytest

from guest_memory import (
    DirtyLog,
    GuestAddress,
    GuestMemory,
    GuestMemoryError,
    Iotlb,
    Iova,
    MemoryHolder,
    OutOfBounds,
    Segment,
    UserAddress,
)


def test_kinds_of_addresses() -> None:
    memory, fd = GuestMemory.allocate(0x1000)
    os.close(fd)
    guest, iova = GuestAddress(0), Iova(0)
    user = memory.regions[0].user_address
    assert_type(user, UserAddress)
    assert_type(memory.user_to_guest(user), GuestAddress)
    assert_type(memory.read(guest, 1), bytes)
    assert_type(memory.read(iova, 1), bytes)
    assert_type(memory.segments(guest, 1), list[Segment])
    assert_type(memory.pieces(guest, 1), list[tuple[int, int]])
    assert_type(memory.window, memoryview | None)
    assert_type(MemoryHolder(memory).current, GuestMemory)
    iotlb = Iotlb()
    iotlb.insert(iova, 0x1000, user, 3)
    assert_type(iotlb.lookup(iova, 1), list[tuple[UserAddress, int]])
    with pytest.raises(GuestMemoryError):
        memory.read(user, 1)  # type: ignore[arg-type]
    memory.read(0, 1)  # type: ignore[arg-type]
    with pytest.raises(OutOfBounds):
        memory.user_to_guest(guest)  # type: ignore[arg-type]
    with pytest.raises(OutOfBounds):
        memory.translate_user(iova, 1)  # type: ignore[arg-type]
    iotlb.insert(guest, 1, user, 1)  # type: ignore[arg-type]
    iotlb.insert(iova, 1, guest, 1)  # type: ignore[arg-type]
    fd = os.memfd_create("log")
    os.ftruncate(fd, 0x1000)
    with DirtyLog(fd, 0x1000) as log:
        log.mark(guest, 1)
        log.mark(iova, 1)  # type: ignore[arg-type]
    os.close(fd)
