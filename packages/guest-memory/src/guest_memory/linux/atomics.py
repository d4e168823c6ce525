"""Atomic operations without C: a futex call changes a word by an atomic instruction."""

import ctypes
import errno
from typing import Any

from ..errors import MappingFailed
from . import syscalls
from .copies import try_copy

_FUTEX_WAKE_OP_PRIVATE = 5 | 128
_OP_ADD = 1
_OP_OR = 2
_OP_XOR = 4
_OP_SHIFT = 8  # the operand is 1 << argument
_idle = ctypes.c_uint32()  # no thread ever waits on it
_IDLE_ADDRESS = ctypes.addressof(_idle)


def _word_operation(
    address: int, operation: int, operand: int, call: Any = syscalls.syscall
) -> bool:
    """Change an aligned 32-bit word atomically; False when its page is missing.

    FUTEX_WAKE_OP changes the word at its second address by an atomic instruction, before it wakes
    threads that wait there (there are none). An operand has 12 signed bits, or is a power of two
    given by its exponent.
    """
    while True:
        code = operation << 28 | (operand & 0xFFF) << 12
        woken: int = call(
            syscalls.FUTEX, _IDLE_ADDRESS, _FUTEX_WAKE_OP_PRIVATE, 0, 0, address, code
        )
        if woken >= 0:
            return True
        error = ctypes.get_errno()
        if error == errno.EFAULT:
            return False
        if error not in (errno.EAGAIN, errno.EINTR):
            raise MappingFailed(error, "futex")


def _each_bit(address: int, operation: int, mask: int) -> bool:
    while mask:
        bit = mask & -mask
        if not _word_operation(address, operation | _OP_SHIFT, bit.bit_length() - 1):
            return False
        mask ^= bit
    return True


def atomic_add(address: int, value: int) -> None:
    """Add to a 32-bit word of this process's own memory; a full barrier that keeps the GIL.

    Args:
        address: host address of the word, aligned to 4 and mapped. The memory must make no thread
            wait, so it must not be a guest's.
        value: from -2048 to 2047; the sum wraps.

    Raises:
        MappingFailed: the system refuses the call, or the word is not there.
    """
    if not _word_operation(address, _OP_ADD, value, syscalls.held_syscall):
        raise MappingFailed(errno.EFAULT, "futex")


def atomic_or(address: int, mask: int) -> bool:
    """OR ``mask`` into a 32-bit word, each bit atomically, low bits first; False on a fault.

    Args:
        address: host address of the word, aligned to 4.
        mask: the bits to set, of 32.

    Raises:
        MappingFailed: the system refuses the call.
    """
    if mask & 0xFFFFF800 == 0xFFFFF800:  # an operand whose sign fills the upper bits
        return _word_operation(address, _OP_OR, (mask & 0x7FF) - 0x800)
    low = mask & 0x7FF
    if low and not _word_operation(address, _OP_OR, low):
        return False
    return _each_bit(address, _OP_OR, mask & ~0x7FF)


def atomic_flip(address: int, mask: int) -> bool:
    """XOR ``mask`` into a 32-bit word, bit by bit, low bits first; False on a fault.

    A reader sees the bits change one after the other.

    Args:
        address: host address of the word, aligned to 4.
        mask: the bits to change, of 32.

    Raises:
        MappingFailed: the system refuses the call.
    """
    return _each_bit(address, _OP_XOR, mask)


def store_halfword(address: int, value: int) -> bool:
    """Store 16 bits so that a reader never sees a torn value of a ring index; False on a fault.

    The kernel may copy two bytes by two stores of one byte. So the upper half of a word (``idx`` of
    a split ring) is changed by additions, whose carry drops out of the word. A reader sees the old
    value, the new one or one between them; all are true of a ring whose entries were written
    before. An addition to the lower half would carry into the upper, so there the bits are flipped;
    a used ring's ``idx`` never lies there. No other thread may store to the word meanwhile.

    Args:
        address: host address, aligned to 2.
        value: the 16 bits to store, in the machine's byte order.

    Raises:
        MappingFailed: the system refuses a call.
    """
    word = address & ~3
    current = ctypes.c_uint32()
    if not try_copy(word, ctypes.addressof(current), 4, False):
        return False
    if address & 2:
        return _each_bit(word, _OP_ADD, ((value - (current.value >> 16)) & 0xFFFF) << 16)
    return _each_bit(word, _OP_XOR, (value ^ current.value) & 0xFFFF)
