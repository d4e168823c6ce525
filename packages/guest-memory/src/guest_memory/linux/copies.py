"""Copies that survive missing pages: the kernel returns EFAULT where an access gets SIGBUS."""

import ctypes
import errno
import os
from typing import ClassVar

from ..errors import MappingFailed
from . import syscalls

_transferred = ctypes.c_ssize_t
_plain = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)
_vectors = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_readv = syscalls.function("process_vm_readv", _transferred, ctypes.c_int, *_vectors)
_writev = syscalls.function("process_vm_writev", _transferred, ctypes.c_int, *_vectors)
_read = syscalls.function("read", _transferred, *_plain)
_write = syscalls.function("write", _transferred, *_plain)

_CHUNK = 1 << 30  # one call moves at most 2 GiB less a page
_without_process_vm = False


class _Iovec(ctypes.Structure):
    base: int
    length: int

    _fields_: ClassVar = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


def try_copy(guest: int, local: int, length: int, to_guest: bool) -> bool:
    """Copy between guest memory and ours with the kernel's help; False when a page is missing.

    For a missing page (its file was truncated) the kernel returns EFAULT, where a direct access
    gets SIGBUS. The bytes before the page have been copied.

    Args:
        guest: host address at which the guest's memory is mapped in this process.
        local: host address of our own memory.
        length: bytes.
        to_guest: True to copy from ours to the guest's, False for the other way.

    Raises:
        MappingFailed: the system refuses the call.
    """
    global _without_process_vm
    while length:
        step = min(length, _CHUNK)
        if _without_process_vm:
            if not _copy_by_pipe(guest, local, step, to_guest):
                return False
        else:
            ours, theirs = _Iovec(local, step), _Iovec(guest, step)
            call = _writev if to_guest else _readv
            done: int = call(os.getpid(), ctypes.addressof(ours), 1, ctypes.addressof(theirs), 1, 0)
            if done < 0:
                error = ctypes.get_errno()
                if error in (errno.EPERM, errno.ENOSYS):  # a seccomp filter, or an odd kernel
                    _without_process_vm = True
                    continue
                if error == errno.EINTR:
                    continue
                if error == errno.EFAULT:
                    return False
                raise MappingFailed(error, "process_vm_writev" if to_guest else "process_vm_readv")
            if not done:
                return False
            step = done  # a fault in the middle ends the call early; the next call fails with it
        guest += step
        local += step
        length -= step
    return True


def _copy_by_pipe(guest: int, local: int, length: int, to_guest: bool) -> bool:
    """Copy through a pipe: read and write return EFAULT too, and no filter forbids them."""
    source, target = (local, guest) if to_guest else (guest, local)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        while length:
            step = min(length, 4096)  # any pipe takes a page without blocking
            put: int = _write(writer, source, step)
            if put <= 0:
                return False
            left = put
            while left:
                got: int = _read(reader, target, left)
                if got <= 0:
                    return False
                target += got
                left -= got
            source += put
            length -= put
    finally:
        os.close(reader)
        os.close(writer)
    return True
