"""The system calls that Python's standard library does not offer, or not with raw addresses."""

import ctypes
import errno
import os
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import MappingFailed

if TYPE_CHECKING:
    from typing_extensions import Buffer

PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MADV_DONTFORK = 10
_MADV_DONTDUMP = 16
_MADV_NOHUGEPAGE = 15
_FAILED = ctypes.c_size_t(-1).value

TMPFS_MAGIC = 0x01021994
RAMFS_MAGIC = 0x858458F6
HUGETLBFS_MAGIC = 0x958458F6

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_libc: Any = ctypes.CDLL(None, use_errno=True)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    try:
        function = _libc[name]
    except AttributeError:

        def unavailable(*_: Any) -> Any:
            raise MappingFailed(errno.ENOSYS, name)

        return unavailable
    function.restype = result
    function.argtypes = arguments
    return function


_size = ctypes.c_size_t
_int = ctypes.c_int
_long = ctypes.c_long
_pointer = ctypes.c_void_p
_mmap = _function("mmap", _size, _size, _size, _int, _int, _int, ctypes.c_int64)
_munmap = _function("munmap", _int, _size, _size)
_madvise = _function("madvise", _int, _size, _size, _int)
_mremap = _function("mremap", _size, _size, _size, _size, _int, _size)
_fstatfs = _function("fstatfs", _int, _int, _pointer)
_readv = _function(
    "process_vm_readv", ctypes.c_ssize_t, _int, _pointer, _size, _pointer, _size, _size
)
_writev = _function(
    "process_vm_writev", ctypes.c_ssize_t, _int, _pointer, _size, _pointer, _size, _size
)
_read = _function("read", ctypes.c_ssize_t, _int, _size, _size)
_write = _function("write", ctypes.c_ssize_t, _int, _size, _size)
syscall: Any = _function("syscall", _long, _long, _size, _size, _size, _size, _size, _size)
ioctl: Any = _function("ioctl", _int, _int, ctypes.c_ulong, _pointer)

# aarch64, riscv64 and loongarch64 share one table of system call numbers.
_X86_64 = os.uname().machine == "x86_64"
_FUTEX = 202 if _X86_64 else 98
USERFAULTFD = 323 if _X86_64 else 282


generation: int = 0
"""How often this process is a forked child: what an ancestor mapped is not here, and not ours."""


def _forked() -> None:
    global generation
    generation += 1


os.register_at_fork(after_in_child=_forked)


def unmap_at_end(mapped_in: int) -> bool:
    """Tell whether a finalizer may unmap what was mapped in generation ``mapped_in``.

    A forked child does not have the mapping, and may have another one at the same place. When the
    interpreter ends, a daemon thread may still be in C with the memory; the kernel unmaps it.
    """
    return mapped_in == generation and not sys.is_finalizing()


def map_memory(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """Call mmap; return the address or raise `MappingFailed`."""
    if length >> 63:  # would be cut to what fits a C type
        raise MappingFailed(errno.ENOMEM)
    result: int = _mmap(address, length, prot, flags, fd, offset)
    if result == _FAILED:
        raise MappingFailed(ctypes.get_errno())
    return result


def reserve_hole(address: int, length: int) -> bool:
    """Reserve a range that may be a hole; False when something is mapped in it."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    try:
        got = map_memory(address, length, PROT_NONE, flags, -1, 0)
    except MappingFailed:
        return False
    if got != address:  # before Linux 4.17 the address is a hint
        unmap_memory(got, length)
        return False
    keep_private(address, length)
    return True


def unmap_memory(address: int, length: int) -> None:
    """Call munmap; raise `MappingFailed` when the kernel runs out of mapping slots."""
    if _munmap(address, length):
        raise MappingFailed(ctypes.get_errno(), "munmap")


def keep_private(address: int, length: int) -> None:
    """Leave a range out of core dumps and of forked children.

    A guest's memory in a core dump is a leak of the guest's secrets; in a child it would be a
    second user of the mapping that nobody counts. Both are advice: a kernel without them is no
    error.
    """
    _madvise(address, length, _MADV_DONTDUMP)
    _madvise(address, length, _MADV_DONTFORK)


def no_huge_pages(address: int, length: int) -> None:
    """Keep the kernel from filling a range with large pages behind a postcopy migration's back."""
    _madvise(address, length, _MADV_NOHUGEPAGE)


def duplicate_mapping(address: int, length: int, target: int) -> int:
    """Map a shared mapping's pages a second time, at ``target`` (0: anywhere); return where."""
    # With an old size of 0 mremap leaves the first mapping where it is.
    flags = _MREMAP_MAYMOVE | (_MREMAP_FIXED if target else 0)
    result: int = _mremap(address, 0, length, flags, target)
    if result == _FAILED:
        raise MappingFailed(ctypes.get_errno(), "mremap")
    return result


_Statfs = ctypes.c_uint64 * 32  # larger than struct statfs, which begins with the two words wanted


def file_system(fd: int) -> tuple[int, int]:
    """Return the type (magic number) and the block size of the file system that ``fd`` is on."""
    buffer = _Statfs()
    if _fstatfs(fd, ctypes.addressof(buffer)):
        raise MappingFailed(ctypes.get_errno(), "fstatfs")
    return buffer[0], buffer[1]


# --- copies that survive missing pages -----------------------------------------------------------

_CHUNK = 1 << 30  # one call moves at most 2 GiB less a page
_without_process_vm = False


class _Iovec(ctypes.Structure):
    base: int
    length: int

    _fields_: ClassVar = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


def try_copy(guest: int, local: int, length: int, to_guest: bool) -> bool:
    """Copy between guest memory and ours with the kernel's help; False when a page is missing.

    A missing page (its file was truncated) is EFAULT for the kernel where it would be SIGBUS for
    us. Both addresses are of this process.
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
            step = done  # a fault in the middle ends the call early; the next one names it
        guest += step
        local += step
        length -= step
    return True


def _copy_by_pipe(guest: int, local: int, length: int, to_guest: bool) -> bool:
    """The same through a pipe: read and write answer EFAULT too, and no filter forbids them."""
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


# --- atomic operations without C -----------------------------------------------------------------

_FUTEX_WAKE_OP_PRIVATE = 5 | 128
_OP_ADD = 1
_OP_OR = 2
_OP_XOR = 4
_OP_SHIFT = 8  # the operand is 1 << argument
_idle = ctypes.c_uint32()  # nobody ever waits on it
_IDLE_ADDRESS = ctypes.addressof(_idle)


def _word_operation(address: int, operation: int, operand: int) -> bool:
    """Change an aligned 32-bit word atomically; False when its page is missing.

    FUTEX_WAKE_OP changes the word at its second address with the machine's atomic instruction
    before it wakes whoever waits there, and nobody does. Operands have 12 signed bits, or are a
    power of two given by its exponent.
    """
    while True:
        code = operation << 28 | (operand & 0xFFF) << 12
        if syscall(_FUTEX, _IDLE_ADDRESS, _FUTEX_WAKE_OP_PRIVATE, 0, 0, address, code) >= 0:
            return True
        error = ctypes.get_errno()
        if error == errno.EFAULT:
            return False
        if error not in (errno.EAGAIN, errno.EINTR):
            raise MappingFailed(error, "futex")


def atomic_or(address: int, mask: int) -> bool:
    """OR ``mask`` into the aligned 32-bit word at ``address``, each bit atomically, low bits first.

    Returns False when the page is missing.
    """
    if mask & 0xFFFFF800 == 0xFFFFF800:  # an operand whose sign fills the upper bits
        return _word_operation(address, _OP_OR, (mask & 0x7FF) - 0x800)
    low = mask & 0x7FF
    if low and not _word_operation(address, _OP_OR, low):
        return False
    mask &= ~0x7FF
    while mask:
        bit = mask & -mask
        if not _word_operation(address, _OP_OR | _OP_SHIFT, bit.bit_length() - 1):
            return False
        mask ^= bit
    return True


def store_halfword(address: int, value: int) -> bool:
    """Store 16 bits so that a reader never sees a torn value of a ring index; False on a fault.

    The kernel's copies of two bytes may be two stores of one. The upper half of a word (``idx`` of
    a split ring) is moved by additions instead, whose carry drops out of the word: a reader sees
    the old value, the new one or one between them, all of which are true of a ring whose entries
    were written before. The lower half cannot be added to without a carry, so its bits are flipped:
    nothing that counts lives there.
    """
    word = address & ~3
    current = ctypes.c_uint32()
    if not try_copy(word, ctypes.addressof(current), 4, False):
        return False
    if address & 2:
        delta, operation, shift = (value - (current.value >> 16)) & 0xFFFF, _OP_ADD, 16
    else:
        delta, operation, shift = (value ^ current.value) & 0xFFFF, _OP_XOR, 0
    while delta:
        bit = delta & -delta
        if not _word_operation(word, operation | _OP_SHIFT, bit.bit_length() - 1 + shift):
            return False
        delta ^= bit
    return True


# --- addresses of Python's buffers ---------------------------------------------------------------


class _PyBuffer(ctypes.Structure):
    buf: int | None
    len: int

    _fields_: ClassVar = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_get_buffer = ctypes.PYFUNCTYPE(_int, ctypes.py_object, _pointer, _int)(
    ("PyObject_GetBuffer", ctypes.pythonapi)
)
_release_buffer = ctypes.PYFUNCTYPE(None, _pointer)(("PyBuffer_Release", ctypes.pythonapi))
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, _pointer, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_bytes_address = ctypes.PYFUNCTYPE(_size, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


class BufferAddress:
    """The address and the size of a contiguous buffer, which stays put inside the ``with`` block.

    Raises:
        BufferError, TypeError: as Python does for objects that are no (writable) buffers.
    """

    __slots__ = ("_buffer", "_data", "_writable")

    def __init__(self, data: "Buffer", writable: bool) -> None:
        self._data = data
        self._writable = int(writable)  # PyBUF_SIMPLE or PyBUF_WRITABLE
        self._buffer = _PyBuffer()

    def __enter__(self) -> tuple[int, int]:
        buffer = self._buffer
        _get_buffer(self._data, ctypes.addressof(buffer), self._writable)
        return buffer.buf or 0, buffer.len

    def __exit__(self, *_: object) -> None:
        _release_buffer(ctypes.addressof(self._buffer))


def new_bytes(length: int) -> tuple[bytes, int]:
    """A bytes object to be filled by its maker before anybody else sees it, and its address."""
    data: bytes = _new_bytes(None, length)
    return data, _bytes_address(data)


def address_of(data: bytes) -> int:
    """Address of a bytes object's content, which never moves."""
    address: int = _bytes_address(data)
    return address
