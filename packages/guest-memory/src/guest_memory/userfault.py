"""Postcopy: pages of guest memory that arrive while the device already runs.

After the switch-over of a postcopy migration some pages are still on the source. The back-end
registers its mappings with a userfaultfd and sends that to the front-end. When a thread touches a
missing page, the front-end gets an event, fetches the page and puts it in place. The thread waits
meanwhile.

The holder of the descriptor decides what this process reads from the registered memory, and can
register more. A front-end owns the guest's memory anyway, but a program should offer postcopy only
to front-ends that it trusts with this process.
"""

import ctypes
import errno
import os
import threading

from .errors import PostcopyError, UsageError
from .linux import syscalls
from .regions.entry import Entry
from .snapshot.memory import GuestMemory

# The ioctl numbers of linux/userfaultfd.h, which contain the sizes of the structures.
_API = 0xC018AA3F
_REGISTER = 0xC020AA00
_UNREGISTER = 0x8010AA01
_WAKE = 0x8010AA02
_NEW = 0x0000AA00  # on /dev/userfaultfd
_MODE_MISSING = 1
_API_VERSION = 0xAA
_CAN_COPY = 1 << 3
_CAN_WAKE = 1 << 2


def _open() -> int:
    """A new userfaultfd that also reports faults inside of system calls such as preadv."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd: int = syscalls.syscall(syscalls.USERFAULTFD, flags, 0, 0, 0, 0, 0)
    if fd >= 0:
        return fd
    failure = ctypes.get_errno()
    if failure == errno.EPERM:  # needs a capability; the device node needs file permissions only
        try:
            device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            raise PostcopyError(failure, "userfaultfd") from None
        try:
            fd = syscalls.ioctl(device, _NEW, flags)
            if fd >= 0:
                return fd
            failure = ctypes.get_errno()
        finally:
            os.close(device)
    raise PostcopyError(failure, "userfaultfd")


class Userfault:
    """The back-end's part of a postcopy migration.

    The steps, by the messages of the specification ("Postcopy"):

    1. POSTCOPY_ADVISE: make a `Userfault` and send its descriptor to the front-end.
    2. SET_MEM_TABLE: map the regions and answer with `GuestMemory.host_addresses`. Once the
       front-end has acknowledged, `register` the new snapshot and use it with
       ``with_postcopy(True)``.
    3. POSTCOPY_END: `close`, and use the memory with ``with_postcopy(False)``.

    Raises:
        PostcopyError: the kernel has no userfaultfd or does not allow it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation = syscalls.generation
        # Each with the entry that keeps it mapped, as long as the range is registered.
        self._ranges: list[tuple[int, int, Entry]] = []
        self._fd: int | None = _open()
        try:
            self._ioctl("UFFDIO_API", _API, _API_VERSION, 0, 0)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor; this object owns it. Sending it to the front-end makes another one.

        Raises:
            UsageError: closed.
        """
        if self._fd is None:
            raise UsageError("the userfaultfd is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._fd is None

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The registered (host address, length) ranges."""
        return tuple((start, length) for start, length, _ in self._ranges)

    def register(self, memory: GuestMemory) -> None:
        """Make accesses to missing pages of all mapped regions wait for the front-end.

        Ranges that are registered already are skipped, so that a table may grow. The memory stays
        mapped until `close`.

        Raises:
            PostcopyError: the kernel cannot do that for this memory; the call has undone its own
                registrations.
            UsageError: closed.
        """
        with self._lock:
            self.fileno()
            known = set(self.ranges)
            fresh: list[tuple[int, int, Entry]] = []
            try:
                for (start, length, page_size), entry in memory._mapped():
                    if (start, length) in known:
                        continue
                    if page_size == syscalls.PAGE_SIZE:
                        syscalls.no_huge_pages(start, length)
                    answer = self._ioctl(
                        "UFFDIO_REGISTER", _REGISTER, start, length, _MODE_MISSING, 0
                    )
                    fresh.append((start, length, entry))
                    if ~answer[3] & (_CAN_COPY | _CAN_WAKE):
                        raise PostcopyError(0, "UFFDIO_REGISTER")
            except BaseException:
                self._unregister(fresh)
                raise
            self._ranges += fresh

    def close(self) -> None:
        """End postcopy: no access waits any more, and missing pages read as zeroes.

        The front-end may still hold its copy of the descriptor, so all ranges are unregistered
        before ours is closed. Calling it again is harmless.
        """
        with self._lock:
            if self._fd is None:
                return
            self._unregister(self._ranges)
            os.close(self._fd)
            self._fd = None
            self._ranges = []

    def __enter__(self) -> "Userfault":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()

    def _unregister(self, ranges: list[tuple[int, int, Entry]]) -> None:
        if self._generation != syscalls.generation:
            return  # in a forked child the descriptor still acts on the parent's memory
        for start, length, entry in ranges:
            if entry.released:
                continue  # unmapped by the garbage collector; another mapping may be there now
            # Ignore a failure: the range may be gone from this process.
            argument = (ctypes.c_uint64 * 2)(start, length)
            syscalls.ioctl(self.fileno(), _UNREGISTER, ctypes.addressof(argument))
            syscalls.ioctl(self.fileno(), _WAKE, ctypes.addressof(argument))

    def _ioctl(self, name: str, request: int, *words: int) -> list[int]:
        argument = (ctypes.c_uint64 * len(words))(*words)
        if syscalls.ioctl(self.fileno(), request, ctypes.addressof(argument)) < 0:
            raise PostcopyError(ctypes.get_errno(), name)
        return list(argument)
