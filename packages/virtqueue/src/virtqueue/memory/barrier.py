"""Memory barriers and atomic operations that Python can reach.

The ring protocols need three things that the language does not have.

**Single accesses.** Indices and flags are loaded and stored through ctypes arrays over the ring
(`words16`, ...): CPython's getter and setter for a naturally aligned ``c_uint16`` copy two bytes
between the memory and a local, which every compiler turns into one load or store.

**A full barrier**, which orders a store before a later load of another location.
`full_barrier` is ``atomic_thread_fence(memory_order_seq_cst)`` out of libatomic where that is
installed: the C11 fence itself.  Otherwise it is one futex(2) FUTEX_WAKE_OP that adds 0 to a
private word: the kernel performs it with a locked instruction on x86, and with a store-release
followed by ``dmb ish`` on arm64; both order everything before against everything after, for
every observer of coherent memory, so also for a partner in another process or in a guest.
membarrier(2) would not do: its private command returns at once in a process of one thread, and
its global command takes milliseconds.

**Ordering of loads with loads and stores with stores** (`order`): x86 keeps both by itself, so
there it is nothing; elsewhere it is the full barrier.

The same futex operation is an atomic OR, XOR and add on any aligned 32-bit word that this process
maps (`atomic_or_bit`, `atomic_flip_bit`, `atomic_add`, `atomic_add_bit`); it raises `OSError`
(EFAULT) where the page is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, Final

_SYS_FUTEX: Final = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "s390x": 238, "ppc64le": 221}
_FUTEX_WAKE_OP_PRIVATE: Final = 5 | 128
_OP_ADD: Final = 1 << 28
_OP_OR: Final = 2 << 28
_OP_XOR: Final = 4 << 28
_OPARG_SHIFT: Final = 8 << 28  # the argument is the number of a bit
_MASK32: Final = 0xFFFFFFFF

_MACHINE: Final = os.uname().machine
STRONGLY_ORDERED: Final = _MACHINE in ("x86_64", "AMD64", "i686", "i386", "s390x")
"""Loads stay in order with loads, and stores with stores, without help."""

_word = ctypes.c_uint32()
_word_address: Final = ctypes.addressof(_word)


def _syscall() -> Any:
    function = ctypes.PyDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    function.argtypes = [
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint32,
    ]
    return function


_call = _syscall()


def _futex(address: int, operation: int) -> None:
    if sys.platform != "linux" or _MACHINE not in _SYS_FUTEX:
        raise OSError(errno.ENOSYS, f"no atomic operations on {sys.platform}/{_MACHINE}")
    while True:
        ctypes.set_errno(0)
        # Wakes nobody: both counts are 0, and nobody waits on a private futex here.
        result = _call(
            _SYS_FUTEX[_MACHINE], _word_address, _FUTEX_WAKE_OP_PRIVATE, 0, 0, address, operation
        )
        if result >= 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            raise OSError(code, "futex")


def futex_barrier() -> None:
    """A full barrier from the kernel."""
    _futex(_word_address, _OP_ADD)


def atomic_add(address: int, value: int) -> None:
    """Add to the 32-bit word at ``address`` (aligned); ``value`` within -2048..2047."""
    _futex(address, _OP_ADD | (value & 0xFFF) << 12)


def atomic_or_bit(address: int, bit: int) -> None:
    """Set ``bit`` (0..31) of the 32-bit word at ``address`` (aligned)."""
    _futex(address, (_OP_OR | _OPARG_SHIFT | bit << 12) & _MASK32)


def atomic_flip_bit(address: int, bit: int) -> None:
    """Change ``bit`` (0..31) of the 32-bit word at ``address`` (aligned)."""
    _futex(address, (_OP_XOR | _OPARG_SHIFT | bit << 12) & _MASK32)


def atomic_add_bit(address: int, bit: int) -> None:
    """Add ``1 << bit`` (0..31) to the 32-bit word at ``address`` (aligned)."""
    _futex(address, (_OP_ADD | _OPARG_SHIFT | bit << 12) & _MASK32)


def _fence() -> Callable[[], object]:
    try:
        function = ctypes.PyDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return futex_barrier
    function.restype = None
    sequentially_consistent = ctypes.c_int(5)

    def fence() -> None:
        function(sequentially_consistent)

    return fence


def _nothing() -> None:
    pass


full_barrier: Callable[[], object] = _fence()
"""Orders every access before it against every access after it."""

order: Callable[[], object] = _nothing if STRONGLY_ORDERED else full_barrier
"""Orders loads against later loads and stores against later stores."""


def words16(address: int, count: int, big_endian: bool = False) -> Any:
    """``count`` 16-bit words at ``address``, each loaded and stored in one access."""
    kind = ctypes.c_uint16.__ctype_be__ if big_endian else ctypes.c_uint16.__ctype_le__
    return (kind * count).from_address(address)


def words32(address: int, count: int, big_endian: bool = False) -> Any:
    """``count`` 32-bit words at ``address``, each loaded and stored in one access."""
    kind = ctypes.c_uint32.__ctype_be__ if big_endian else ctypes.c_uint32.__ctype_le__
    return (kind * count).from_address(address)


def octets(address: int, count: int) -> Any:
    """``count`` bytes at ``address``."""
    return (ctypes.c_uint8 * count).from_address(address)
