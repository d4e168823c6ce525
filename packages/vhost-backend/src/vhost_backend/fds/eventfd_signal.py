"""Adding one to a front-end's eventfd without ever waiting for it.

write(2) to an eventfd waits while the counter is full, unless the file is non-blocking. All holders
of the file share that flag. Polling first does not help: the front-end can fill the counter between
the poll and the write. No other call writes an eventfd without waiting, and it cannot be opened a
second time.

The kernel's own signal never waits: it adds to the counter up to the limit (eventfd_signal). Native
asynchronous I/O makes the kernel do that. A request that names an eventfd (IOCB_FLAG_RESFD) signals
it on completion, and a read of no bytes from /dev/null completes at once, in one system call. The
call also tells whether the descriptor is an eventfd at all.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from typing import Any, ClassVar, Final

_NUMBERS: Final = {
    # io_setup, io_submit, io_getevents
    "x86_64": (206, 209, 208),
    "aarch64": (0, 2, 4),
    "riscv64": (0, 2, 4),
}
_IOCB_CMD_PREAD: Final = 0
_IOCB_FLAG_RESFD: Final = 1
# The size asked of io_setup, and the most completions that one call throws away.
_EVENTS: Final = 64
# Attempts to submit: other threads may use up the room that one has made.
_TRIES: Final = 16


class _Iocb(ctypes.Structure):
    """``struct iocb`` of <linux/aio_abi.h> on little-endian machines."""

    data: int
    key: int
    rw_flags: int
    opcode: int
    priority: int
    file: int
    buffer: int
    length: int
    offset: int
    reserved: int
    flags: int
    eventfd: int

    _fields_: ClassVar = [
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_int),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("file", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    ]


class _Context:
    """The process's asynchronous I/O context in the kernel; all threads use it."""

    def __init__(self) -> None:
        self.error: int = 0
        """The error number with which making the context failed, or 0."""
        self._local = threading.local()
        numbers = _NUMBERS.get(os.uname().machine)
        if numbers is None or ctypes.sizeof(ctypes.c_long) != 8:
            self.error = errno.ENOSYS
            return
        setup, submit, get_events = map(ctypes.c_long, numbers)
        # The calls are short and never wait, so they keep the GIL.
        call: Any = ctypes.PyDLL(None, use_errno=True).syscall
        call.restype = ctypes.c_long
        self._call = call
        handle = ctypes.c_ulong()
        if call(setup, ctypes.c_uint(_EVENTS), ctypes.byref(handle)):
            self.error = ctypes.get_errno()
            return
        self.null: int = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._handle = ctypes.c_ulong(handle.value)
        self._one = ctypes.c_long(1)
        self._submit = submit
        self._get_events = get_events

    def _prepare(self) -> tuple[_Iocb, Any]:
        request = _Iocb(opcode=_IOCB_CMD_PREAD, file=self.null, flags=_IOCB_FLAG_RESFD)
        array = (ctypes.c_void_p * 1)(ctypes.addressof(request))
        self._local.prepared = request, array
        return request, array

    def add_one(self, fd: int) -> int:
        prepared = getattr(self._local, "prepared", None)
        request, array = prepared if prepared is not None else self._prepare()
        request.eventfd = fd
        error = 0
        for _ in range(_TRIES):
            if self._call(self._submit, self._handle, self._one, array) == 1:
                return 0
            error = ctypes.get_errno()
            if error != errno.EAGAIN:
                break
            self._forget_completions()
        return error

    def _forget_completions(self) -> None:
        """Throw away results, which are of no use, to make room for more."""
        events = (ctypes.c_uint64 * (4 * _EVENTS))()
        at_once = (ctypes.c_int64 * 2)()
        least, most = ctypes.c_long(0), ctypes.c_long(_EVENTS)
        self._call(self._get_events, self._handle, least, most, events, at_once)

    def abandon(self) -> None:
        """Drop this object in a forked child, which does not inherit the kernel's context."""
        if not self.error:
            os.close(self.null)


_context: _Context | None = None
_lock = threading.Lock()


def _forked() -> None:
    global _context, _lock
    context, _context, _lock = _context, None, threading.Lock()
    if context is not None:
        context.abandon()


os.register_at_fork(after_in_child=_forked)


def add_one(fd: int) -> int:
    """Add one to the eventfd `fd`; a full counter stays full, which wakes its reader as well.

    Returns 0 or an error number. EINVAL means that `fd` is no eventfd, EBADF that it is not open.
    Any other means that this system does not allow the call (ENOSYS, EPERM from a seccomp filter,
    or EAGAIN where fs.aio-max-nr is used up).
    """
    context = _context
    if context is None:
        context = _make()
    return context.error or context.add_one(fd)


def _make() -> _Context:
    global _context
    with _lock:
        if _context is None:
            _context = _Context()
        return _context
