"""Memory barriers and single accesses that Python can reach.

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
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Final

from guest_memory import atomic_add

_MACHINE: Final = os.uname().machine
STRONGLY_ORDERED: Final = _MACHINE in ("x86_64", "AMD64", "i686", "i386", "s390x")
"""Loads stay in order with loads, and stores with stores, without help."""

_word = ctypes.c_uint32()
_word_address: Final = ctypes.addressof(_word)


def futex_barrier() -> None:
    """A full barrier from the kernel."""
    atomic_add(_word_address, 0)


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
