"""Grant references of another domain, mapped through ``/dev/xen/gntdev``."""

from __future__ import annotations

import errno
from typing import Final

from .abi import MAP_GRANT_REF, UNMAP_GRANT_REF, XEN_PAGE_SIZE, MapRequest, UnmapRequest
from .calls import PROT_READ, PROT_WRITE, SystemCalls, generation, may_release
from .errors import GrantMapError, XenReleaseError

# The kernel's own limit for one request is 65,536 unless its administrator raised it.
MAX_GRANTS: Final = 1 << 20


class GrantRange:
    """Consecutive grant references, mapped from construction to `release`.

    Only mmap checks the references. MAP_GRANT_REF succeeds for wrong ones, too, and its reservation
    must be given back in any case. `fd` must stay open until `release`.
    """

    __slots__ = ("_calls", "_count", "_fd", "_generation", "_index", "address")

    def __init__(
        self, calls: SystemCalls, fd: int, domid: int, first: int, count: int, writable: bool
    ) -> None:
        self._calls = calls
        self._generation = generation()
        self._fd = fd
        self._count = count
        request = MapRequest(domid, first, count)
        try:
            calls.ioctl(fd, MAP_GRANT_REF, request.argument)
        except OSError as error:
            raise GrantMapError(
                error.errno, "MAP_GRANT_REF", domid, first, count, writable
            ) from error
        self._index = request.index
        # A page that was granted for reading only cannot be mapped writable, not even in part.
        protection = PROT_READ | PROT_WRITE if writable else PROT_READ
        try:
            self.address: int = calls.mmap(0, count * XEN_PAGE_SIZE, protection, fd, self._index)
        except BaseException as error:
            self._give_back()
            if isinstance(error, OSError):
                raise GrantMapError(error.errno, "mmap", domid, first, count, writable) from error
            raise

    def _give_back(self) -> None:
        try:
            request = UnmapRequest(self._index, self._count)
            self._calls.ioctl(self._fd, UNMAP_GRANT_REF, request.argument)
        except OSError as error:
            # The front-end has the same open file, and may have given the references back already.
            if error.errno != errno.ENOENT:
                raise XenReleaseError(error.errno, "UNMAP_GRANT_REF") from error

    def release(self) -> None:
        """Unmap the pages, then give the references back.

        In the other order the kernel would exchange the pages under the mapping, and a late access
        would read other memory.
        """
        if not may_release(self._generation):
            return
        try:
            self._calls.munmap(self.address, self._count * XEN_PAGE_SIZE)
        except OSError as error:
            raise XenReleaseError(error.errno, "munmap") from error
        finally:
            self._give_back()
