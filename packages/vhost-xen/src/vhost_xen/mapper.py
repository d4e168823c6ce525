"""`XenMapper`: maps the regions of a front-end on Xen into this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from guest_memory import Access, Mapper, Mapping, MmapMapper, Region, WindowMapper

from . import foreign, grant
from .abi import MAP_GRANT_REF, MMAPBATCH_V2, XEN_PAGE_SIZE, BatchRequest, MapRequest
from .calls import LinuxCalls, SystemCalls
from .errors import XenFileError, XenMapError, XenRegionError, XenUnavailable, XenUsageError
from .flags import XenFlags, check_region, first_page, page_count
from .foreign import ForeignRange
from .grant import GrantRange

if TYPE_CHECKING:
    from guest_memory import Window

PRIVCMD: Final = "privcmd"
GNTDEV: Final = "gntdev"
_DEVICES: Final = "/dev/xen"


class XenMapper:
    """Maps regions as their Xen flags say; a `guest_memory.Mapper`.

    Regions without flags are mapped by the mapper given as `files`. FOREIGN and GRANT regions
    come with an open ``/dev/xen/privcmd`` or ``/dev/xen/gntdev``; this process needs no device
    file of its own.

    Args:
        files: maps regions without Xen flags; `guest_memory.MmapMapper` when None.
        calls: the system calls; those of this machine when None. Tests pass a recorder.

    Raises:
        XenUnavailable: this is not Linux.
    """

    xen_mmap: Final = True
    """Tells back-ends to offer XEN_MMAP with this mapper, and not to offer postcopy."""

    def __init__(self, files: Mapper | None = None, calls: SystemCalls | None = None) -> None:
        self._files = MmapMapper() if files is None else files
        self._calls = LinuxCalls() if calls is None else calls

    def map(self, region: Region, fd: int | None) -> Mapping:
        """Map one region (vhost-user: "Memory region description", XEN_MMAP).

        Args:
            region: its `flags` and `domid` are the message's last two fields. NO_ADVANCE_MAP may
                have either form that is in use, 0x100 or 8.
            fd: borrowed for the call. Grants keep a duplicate until the mapping is closed.

        Returns:
            A mapping with a host address. With NO_ADVANCE_MAP it has none: `pin` maps the pages of
            a range, read-only for a read access, and `unpin` unmaps them.

        Raises:
            XenRegionError: the region breaks a rule, see `XenFlagsError`, `XenDomainError`,
                `XenAlignmentError` and `XenFileError` below it.
            GrantMapError, ForeignMapError: pages could not be mapped; no page of the region is.
            XenUnavailable: this kernel's page size is not Xen's.
            GuestMemoryError: an error of the mapper for regions without flags.
        """
        return self._map(region, fd, None)

    def map_into(self, region: Region, fd: int | None, window: Window) -> Mapping:
        """Map one region into a window where that is possible, and elsewhere otherwise.

        FOREIGN regions and those without flags go into the window. Grants never do: a wrong grant
        of a guest would leave a hole in it. The rest is as in `map`. Also raises
        guest_memory.WindowFull, which leaves nothing mapped.
        """
        return self._map(region, fd, window)

    def _map(self, region: Region, fd: int | None, window: Window | None) -> Mapping:
        flags = check_region(region)
        if not flags:
            if window is not None and isinstance(self._files, WindowMapper):
                return self._files.map_into(region, fd, window)
            return self._files.map(region, fd)
        if self._calls.page_size != XEN_PAGE_SIZE:
            raise XenUnavailable(
                f"pages of this kernel have {self._calls.page_size} bytes, Xen's {XEN_PAGE_SIZE}"
            )
        if flags & XenFlags.FOREIGN:
            return self._map_foreign(region, _file(region, fd, PRIVCMD), window)
        fd = _file(region, fd, GNTDEV)
        if flags & XenFlags.NO_ADVANCE_MAP:
            self._check_device(region, fd, GNTDEV)
            return GrantsOnDemand(self._calls, self._duplicate(region, fd), region)
        return self._map_grants(region, fd)

    def _map_foreign(self, region: Region, fd: int, window: Window | None) -> Mapping:
        count = page_count(region.size)
        if count > foreign.MAX_PAGES:
            raise _too_large(region, foreign.MAX_PAGES)
        self._check_device(region, fd, PRIVCMD)
        first = first_page(region.guest_address)
        pages = ForeignRange(self._calls, fd, region.domid, first, count, window)
        return WholeMapping(region, pages.address, pages.release)

    def _map_grants(self, region: Region, fd: int) -> Mapping:
        count = page_count(region.size)
        if count > grant.MAX_GRANTS:
            raise _too_large(region, grant.MAX_GRANTS)
        self._check_device(region, fd, GNTDEV)
        with ExitStack() as stack:
            own = self._duplicate(region, fd)
            stack.callback(self._calls.close, own)
            first = first_page(region.guest_address)
            pages = GrantRange(self._calls, own, region.domid, first, count, writable=True)
            stack.callback(pages.release)
            return WholeMapping(region, pages.address, stack.pop_all().close)

    def _duplicate(self, region: Region, fd: int) -> int:
        try:
            return self._calls.duplicate(fd)
        except OSError as error:
            raise XenMapError(error.errno, "dup", region.domid, page_count(region.size)) from error

    def _check_device(self, region: Region, fd: int, device: str) -> None:
        # Only the right driver answers a request for no pages with EINVAL. Without this check a
        # file of any kind could be mapped far beyond its end, and arrays as large as the region
        # filled, before the first error.
        if device == PRIVCMD:
            number, argument = MMAPBATCH_V2, BatchRequest(region.domid, 0, 0, 0).argument
        else:
            number, argument = MAP_GRANT_REF, MapRequest(region.domid, 0, 0).argument
        try:
            if self._calls.is_character_device(fd):
                self._calls.ioctl(fd, number, argument)
            reason = "another file"
        except OSError as error:
            if error.errno == errno.EINVAL:
                return
            reason = os.strerror(error.errno or errno.EIO)
        raise _file_error(region, device, f"its file is not a usable {_DEVICES}/{device}: {reason}")


def _file_error(region: Region, device: str, reason: str) -> XenFileError:
    return XenFileError(region.guest_address, region.size, f"{_DEVICES}/{device}", reason)


def _file(region: Region, fd: int | None, device: str) -> int:
    if fd is None:
        raise _file_error(region, device, f"it comes without a file, {_DEVICES}/{device} is needed")
    if region.mmap_offset:
        raise _file_error(region, device, "it has an offset into its file, which must be 0")
    return fd


def _too_large(region: Region, pages: int) -> XenRegionError:
    return XenRegionError(region.guest_address, region.size, f"more than {pages} pages at once")


class WholeMapping:
    """A region that is mapped as a whole, so `pin` only computes an address.

    Args:
        region: the region.
        address: its host address.
        release: unmaps it; called once.
    """

    def __init__(self, region: Region, address: int, release: Callable[[], None]) -> None:
        self._region = region
        self._address: int | None = address
        self._release = release
        self._lock = Lock()  # so that only one `close` releases

    @property
    def host_address(self) -> int | None:
        """Host address of the region's first byte; None after `close`."""
        return self._address

    @property
    def size(self) -> int:
        """The region's size in bytes, which need not be whole pages."""
        return self._region.size

    @property
    def page_size(self) -> int:
        """Size in bytes of a page."""
        return XEN_PAGE_SIZE

    @property
    def poisoned(self) -> bool:
        """Always False: pages stay readable when their domain is gone."""
        return False

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        """Return the host address of a range, valid until `close`, and None."""
        _check_range(self._region, address, length, access)
        base = self._address
        if base is None:
            raise XenUsageError("the mapping is closed")
        return base + address - self._region.guest_address, None

    def unpin(self, token: Any) -> None:
        """Do nothing: the region stays mapped until `close`."""

    def close(self) -> None:
        """Release the memory. Calling it again is harmless."""
        with self._lock:
            if self._address is None:
                return
            self._address = None
        self._release()

    def __del__(self) -> None:
        self.close()


class GrantsOnDemand:
    """Granted pages of another domain, each mapped only while it is pinned.

    Every pin is a mapping of its own, and the hypervisor counts them. So a page that two requests
    touch stays mapped until both are done.
    """

    def __init__(self, calls: SystemCalls, fd: int, region: Region) -> None:
        self._calls = calls
        self._fd = fd
        self._region = region
        # Guards the three fields below.
        self._lock = Lock()
        self._pinned: set[GrantRange] = set()
        self._mapping = 0  # pins that are being made or released now
        self._closed = False

    @property
    def host_address(self) -> int | None:
        """None: there is no address before `pin`."""
        return None

    @property
    def size(self) -> int:
        """The region's size in bytes."""
        return self._region.size

    @property
    def page_size(self) -> int:
        """Size in bytes of a page."""
        return XEN_PAGE_SIZE

    @property
    def poisoned(self) -> bool:
        """Always False: a pinned page stays readable when its domain is gone."""
        return False

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        """Map the pages that a range touches.

        Args:
            address: guest address of the first byte, inside the region.
            length: bytes, at least 1; the range ends inside the region.
            access: 1 read, 2 write, 3 both. With 1 pages are mapped read-only, because the guest
                may have granted them for reading only.

        Returns:
            The host address of the first byte, and the token for `unpin`.

        Raises:
            GrantMapError: the pages could not be mapped; none of them is.
            XenRegionError: the range has too many pages to be mapped at once.
            XenUsageError: the range is not inside the region, or the mapping is closed.
        """
        _check_range(self._region, address, length, access)
        offset = address % XEN_PAGE_SIZE
        count = page_count(offset + length)
        if count > grant.MAX_GRANTS:
            raise _too_large(self._region, grant.MAX_GRANTS)
        with self._lock:
            if self._closed:
                raise XenUsageError("the mapping is closed")
            self._mapping += 1
        try:
            pages = GrantRange(
                self._calls,
                self._fd,
                self._region.domid,
                first_page(address),
                count,
                writable=access != Access.READ,
            )
        except BaseException:
            self._end()
            raise
        with self._lock:
            self._mapping -= 1
            self._pinned.add(pages)
        return pages.address + offset, pages

    def unpin(self, token: Any) -> None:
        """Unmap the pages of the `pin` that returned `token`."""
        with self._lock:
            if token not in self._pinned:
                raise XenUsageError("nothing is pinned by this token")
            self._pinned.remove(token)
            self._mapping += 1
        try:
            token.release()
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._mapping -= 1
            last = self._closed and not self._mapping and not self._pinned
        if last:
            self._calls.close(self._fd)

    def close(self) -> None:
        """Refuse new pins; present ones last until `unpin`. Calling it again is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            last = not self._mapping and not self._pinned
        if last:
            self._calls.close(self._fd)

    def __del__(self) -> None:
        self.close()


def _check_range(region: Region, address: int, length: int, access: int) -> None:
    if access not in (1, 2, 3):
        raise XenUsageError(f"no such access: {access}")
    if length < 1 or not region.guest_address <= address <= region.guest_end - length:
        raise XenUsageError(f"{length:#x} bytes at {address:#x} are not inside the region")
