# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""Files read into guest memory and written from it, also where newer calls are refused."""

import errno
import os
from typing import NoReturn

import pytest
from guest_memory_support import memfd, region

from guest_memory import GuestMemory


@pytest.mark.parametrize(
    "refusal",
    [PermissionError(errno.EPERM, "no"), OSError(errno.ENOSYS, "no"), NotImplementedError()],
    ids=["seccomp", "kernel", "library"],
)
def test_a_file_moves_without_preadv2_and_pwritev2(
    monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise type(refusal)(*refusal.args)  # one that is kept would keep the frames

    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "pwritev", refuse)
    with memfd(0x2000) as fd, memfd(0x2000) as file:
        os.pwrite(file, b"from the file", 0x10)
        # Two regions, side by side: a piece at a time moves.
        memory = GuestMemory.map([(region(0, 0x1000), fd), (region(0x1000, 0x1000, 0x1000), fd)])
        assert memory.copy_from_fd(0xFF8, file, 13, 0x10) == 8
        assert memory.copy_from_fd(0x1000, file, 5, 0x18) == 5
        assert memory.read(0xFF8, 13) == b"from the file"
        assert memory.copy_to_fd(0x1000, file, 5, 0x100) == 5
        assert os.pread(file, 5, 0x100) == b" file"
        with pytest.raises(OSError, match="Bad file descriptor"):
            memory.copy_to_fd(0, -1, 1, 0)
