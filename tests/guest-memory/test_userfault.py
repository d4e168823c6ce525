# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""Postcopy: accesses to missing pages wait for whoever holds the userfaultfd."""

import ctypes
import gc
import os
import select
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from guest_memory_support import SEALED, memfd, open_fds, region

from guest_memory import GuestMemory, MmapMapper, PostcopyError, UsageError, Userfault
from guest_memory.linux import syscalls

PAGE = 4096
UFFDIO_COPY = 0xC028AA03


def _usable() -> str:
    try:
        Userfault().close()
    except PostcopyError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_usable()), reason=f"no userfaultfd here: {_usable()}")


def serve(fd: int, content: bytes, served: list[int], stop: threading.Event) -> None:
    """The front-end's part: put ``content`` into every page that somebody waits for."""
    while not stop.is_set():
        if not select.select([fd], [], [], 0.02)[0]:
            continue
        try:
            message = os.read(fd, 32)
        except BlockingIOError:
            continue
        _, _, address = struct.unpack_from("=QQQ", message)
        served.append(address & -PAGE)
        page = ctypes.create_string_buffer(content, PAGE)
        argument = struct.pack("=QQQQq", address & -PAGE, ctypes.addressof(page), PAGE, 0, 0)
        buffer = ctypes.create_string_buffer(argument, len(argument))
        assert syscalls.ioctl(fd, UFFDIO_COPY, ctypes.addressof(buffer)) == 0


def test_accesses_wait_for_their_pages() -> None:
    with memfd(8 * PAGE, SEALED) as fd, memfd(PAGE) as source, Userfault() as fault:
        memory = GuestMemory.map([(region(0, 4 * PAGE, 8), fd)]).with_postcopy(True)
        assert not memory.bounded
        fault.register(memory)
        memory = memory.add(region(8 * PAGE, 2 * PAGE, 5 * PAGE), fd)
        fault.register(memory)
        assert len(fault.ranges) == 2
        front_end = os.dup(fault.fileno())
        stop, served = threading.Event(), list[int]()
        thread = threading.Thread(target=serve, args=(front_end, b"x" * PAGE, served, stop))
        thread.start()
        try:
            assert memory.read(0, 4) == b"xxxx"
            assert memory.load(8 * PAGE, 4) == 0x78787878
            memory.store(9 * PAGE, 8, 1)
            assert memory.write(2 * PAGE, b"yy") == 2
            assert memory.read(2 * PAGE - 1, 4) == b"xyyx"
            os.pwrite(source, b"z" * 16, 0)
            assert memory.copy_from_fd(3 * PAGE, source, 16, 0) == 16
            assert memory.read(3 * PAGE, 17) == b"z" * 16 + b"x"
            assert len(served) == 5
            assert memory.host_addresses[0] == served[0] + 8
        finally:
            stop.set()
            thread.join()
        # Ended: nobody waits any more, although the front-end still has its descriptor.
        fault.close()
        assert fault.closed
        memory = memory.with_postcopy(False)
        assert memory.bounded
        assert memory.read(9 * PAGE, 8) == b"\1" + bytes(7)
        assert len(served) == 5
        os.close(front_end)


def test_a_page_that_nobody_brings_waits_until_the_end() -> None:
    with memfd(2 * PAGE, SEALED) as fd:
        memory = GuestMemory.map([(region(0, 2 * PAGE), fd)]).with_postcopy(True)
        fault = Userfault()
        fault.register(memory)
        result: list[Any] = []
        thread = threading.Thread(target=lambda: result.append(memory.read(PAGE, 4)))
        thread.start()
        assert select.select([fault.fileno()], [], [], 10)[0], "somebody waits"
        assert not result
        fault.close()
        thread.join(60)
        assert result == [bytes(4)]


def test_its_own_rules() -> None:
    before = open_fds()
    fault = Userfault()
    assert not os.get_inheritable(fault.fileno())
    fault.register(GuestMemory())
    assert fault.ranges == ()
    fault.close()
    fault.close()
    with pytest.raises(UsageError):
        fault.fileno()
    with pytest.raises(UsageError):
        fault.register(GuestMemory())
    fault = Userfault()
    del fault
    gc.collect()
    assert open_fds() == before


def test_memory_that_cannot_wait(tmp_path: Path) -> None:
    """Files of a disk's file system have no missing pages; nothing stays registered."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, memfd(PAGE, SEALED) as fd, Userfault() as fault:
        memory = GuestMemory.map(
            [(region(0, PAGE), fd), (region(PAGE, PAGE), file.fileno())], MmapMapper(guarded=True)
        )
        with pytest.raises(PostcopyError) as caught:
            fault.register(memory)
        assert caught.value.call == "UFFDIO_REGISTER"
        assert fault.ranges == ()
        assert memory.read(0, 4) == bytes(4)


def test_a_refusal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_fds()
    monkeypatch.setattr(syscalls, "ioctl", lambda *_: -1)
    with pytest.raises(PostcopyError):
        Userfault()
    monkeypatch.setattr(syscalls, "syscall", lambda *_: -1)
    with pytest.raises(PostcopyError, match="userfaultfd"):
        Userfault()
    assert open_fds() == before
