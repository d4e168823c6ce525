"""Frames of another domain, mapped at once through ``/dev/xen/privcmd``."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from .abi import MMAPBATCH_V2, XEN_PAGE_SIZE, BatchRequest
from .calls import PROT_READ, PROT_WRITE, SystemCalls, generation, may_release
from .errors import ForeignMapError, XenReleaseError

if TYPE_CHECKING:
    from guest_memory import Window

# 1 TiB: the request's arrays take 12 bytes for each page while it runs.
MAX_PAGES: Final = 1 << 28
_FAILURES_KEPT: Final = 64


class ForeignRange:
    """Consecutive frames of one domain, mapped from construction to `release`.

    The kernel may report success although some frames could not be mapped, and an access to such a
    page gets SIGBUS. So a range with any failed page is unmapped again, and ForeignMapError lists
    the frames.

    With a `window` the frames are mapped into it, and released by its `cover`. privcmd refuses no
    mmap, so a hole in the window, into which another thread's mapping could come, is unlikely.
    Grants would leave such holes: gntdev refuses wrong references in mmap.
    """

    __slots__ = ("_calls", "_generation", "_length", "_window", "address")

    def __init__(
        self,
        calls: SystemCalls,
        fd: int,
        domid: int,
        first_frame: int,
        count: int,
        window: Window | None = None,
    ) -> None:
        self._calls = calls
        self._generation = generation()
        self._length = count * XEN_PAGE_SIZE
        self._window = window
        place = window.take(self._length, XEN_PAGE_SIZE) if window else 0
        try:
            self.address: int = calls.mmap(place, self._length, PROT_READ | PROT_WRITE, fd, 0)
        except BaseException as error:
            if window:
                window.restore(place, self._length)
            if isinstance(error, OSError):
                raise ForeignMapError(error.errno, "mmap", domid, first_frame, count) from error
            raise
        try:
            self._populate(fd, domid, first_frame, count)
        except BaseException:
            self.release()
            raise

    def _populate(self, fd: int, domid: int, first_frame: int, count: int) -> None:
        request = BatchRequest(domid, first_frame, count, self.address)
        number = 0
        try:
            self._calls.ioctl(fd, MMAPBATCH_V2, request.argument)
        except OSError as error:
            number = error.errno or errno.EIO
        failed, failures = request.failures(_FAILURES_KEPT)
        if failures:
            number = number or failures[0][1]
        if number:
            raise ForeignMapError(
                number, "MMAPBATCH_V2", domid, first_frame, count, failed, failures
            )

    def release(self) -> None:
        """Unmap the frames."""
        if self._window:
            self._window.cover(self.address, self._length)
            return
        if not may_release(self._generation):
            return
        try:
            self._calls.munmap(self.address, self._length)
        except OSError as error:
            raise XenReleaseError(error.errno, "munmap") from error
