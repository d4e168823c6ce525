"""Requests of the back-end, on the channel of SET_BACKEND_REQ_FD.

A descriptor that a message brings is never part of the value: it travels beside it.
"""

from __future__ import annotations

from struct import Struct
from typing import ClassVar

from .constants import NO_FD, BackendRequest, ShmemMapFlags
from .message import BIG, LITTLE, Converters, Message, Request, Wire, known_bits
from .replies import Ack
from .shapes import Iotlb, RingOnly, SharedObject

_AREA = {o: Struct(f"{o}QQQ") for o in (LITTLE, BIG)}


class BackendIotlbMsg(Iotlb, code=BackendRequest.IOTLB_MSG):
    """Report an IOTLB miss or an access failure."""


class BackendConfigChange(Request[Ack], code=BackendRequest.CONFIG_CHANGE_MSG, layout=""):
    """The configuration space has changed."""


class BackendVringHostNotifier(Request[Ack], code=BackendRequest.VRING_HOST_NOTIFIER_MSG):
    """Set (with a descriptor) or remove (``no_fd``) a ring's host notifier.

    ``size`` and ``offset`` are bytes, of the area in the descriptor.
    """

    index: int
    size: int
    offset: int
    no_fd: bool = False

    _sizes = (24,)
    _convert: ClassVar[Converters] = {"no_fd": bool}

    def _check(self) -> None:
        if not 0 <= self.index <= 0xFF:
            raise self._wrong("index", self.index, "must fit 8 bits")
        for name in ("size", "offset"):
            if not 0 <= getattr(self, name) < 1 << 64:
                raise self._wrong(name, getattr(self, name), "must fit 64 bits")

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        value, size, offset = _AREA[wire.order].unpack(payload)
        if value > 0x1FF:
            raise cls._wrong("u64", value, "bits 9 to 63 are reserved")
        return cls._build((value & 0xFF, size, offset, value & NO_FD))

    def _encode(self, wire: Wire) -> bytes:
        value = self.index | (NO_FD if self.no_fd else 0)
        return _AREA[wire.order].pack(value, self.size, self.offset)


class BackendVringCall(RingOnly[Ack], code=BackendRequest.VRING_CALL):
    """In-band notification: buffers of the ring were used.  ``num`` is reserved."""


class BackendVringErr(RingOnly[Ack], code=BackendRequest.VRING_ERR):
    """In-band notification: an error on the ring.  ``num`` is reserved."""


class BackendSharedObjectAdd(SharedObject[Ack], code=BackendRequest.SHARED_OBJECT_ADD):
    """Announce a shared object."""


class BackendSharedObjectRemove(SharedObject[Ack], code=BackendRequest.SHARED_OBJECT_REMOVE):
    """Withdraw a shared object."""


class BackendSharedObjectLookup(SharedObject[Ack], code=BackendRequest.SHARED_OBJECT_LOOKUP):
    """Ask for another device's shared object; answered with its dma-buf and 0, or an error."""


class _ShmemArea(Request[Ack], layout="B7xQQQQ"):
    _abstract = True

    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: ShmemMapFlags = ShmemMapFlags.READ_ONLY

    _convert: ClassVar[Converters] = {"flags": known_bits(ShmemMapFlags, 1)}

    def _check(self) -> None:
        for name in ("fd_offset", "shm_offset"):
            if getattr(self, name) + self.length > 1 << 64:
                raise self._wrong(name, getattr(self, name), "the area ends beyond 64 bits")


class BackendShmemMap(_ShmemArea, code=BackendRequest.SHMEM_MAP):
    """Map a descriptor into a shared memory region of the device (offsets and length in bytes)."""


class BackendShmemUnmap(_ShmemArea, code=BackendRequest.SHMEM_UNMAP):
    """Unmap what a SHMEM_MAP mapped; ``fd_offset`` has no meaning."""
