"""A virtio-blk driver over a `DriverSession`: many requests at a time, or one."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from guest_memory import GuestAddress

from ..devices.blk import (
    F_BLK_SIZE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    ID_LENGTH,
    S_OK,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from ..errors import VhostBackendError
from .session import DriverSession

#: What this driver makes use of when the device offers it.
DRIVER_FEATURES: Final = (
    F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ | F_DISCARD | F_WRITE_ZEROES
)

_HEADER: Final = struct.Struct("<IIQ")
_RANGE: Final = struct.Struct("<QII")
_STATUS_UNSET: Final = 0xFF


class BlockError(VhostBackendError):
    """A request ended with a status other than OK (1 I/O error, 2 unsupported)."""

    def __init__(self, kind: int, sector: int, status: int) -> None:
        super().__init__(f"request type {kind} at sector {sector}: status {status}")
        self.kind = kind
        self.sector = sector
        self.status = status


class Completion(NamedTuple):
    """A finished request: the `tag` it was submitted with, its `status`, bytes written."""

    tag: object
    status: int
    written: int


class _Slot:
    """Shared memory for one request: header, data, status, each at its own guest address."""

    __slots__ = ("address", "data", "kind", "length", "sector", "status", "tag")

    def __init__(self, session: DriverSession, data_size: int) -> None:
        self.address = session.allocate(_HEADER.size)
        self.status = session.allocate(1)
        self.data = session.allocate(data_size, align=512)
        self.kind = self.sector = self.length = 0
        self.tag: object = None


class BlockDriver:
    """Requests on queue `queue` of a session.

    Up to `depth` requests of up to `max_io` bytes each are in flight at a time. Descriptors go into
    an indirect table when the session negotiated that and `indirect` says so.
    """

    def __init__(
        self,
        session: DriverSession,
        *,
        queue: int = 0,
        depth: int = 32,
        max_io: int = 65536,
        indirect: bool = False,
    ) -> None:
        self._session = session
        self._vring = session.vrings[queue]
        self._indirect = indirect
        self._max_io = max_io
        self._free = [_Slot(session, max_io) for _ in range(depth)]
        self._busy: dict[int, _Slot] = {}

    # -- the device -----------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Size of the disk in bytes, from its configuration space."""
        data = self._session.frontend.get_config(0, 8)
        return int.from_bytes(data, "little") * SECTOR

    @property
    def read_only(self) -> bool:
        """Whether the device offered the disk as read-only."""
        return bool(self._session.features & F_RO)

    # -- many at a time -------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests submitted and not collected yet."""
        return len(self._busy)

    @property
    def idle_slots(self) -> int:
        """Requests that can be submitted before one has to be collected."""
        return len(self._free)

    def submit(
        self, kind: int, sector: int = 0, payload: bytes = b"", length: int = 0, tag: object = None
    ) -> None:
        """Add a request: `payload` is sent to the device, `length` bytes are wanted back.

        It becomes visible at the next `kick`. Raises `IndexError` when `depth` are in flight.
        """
        slot = self._free.pop()
        memory = self._session.memory
        slot.kind, slot.sector, slot.length, slot.tag = kind, sector, length, tag
        memory.write(slot.address, _HEADER.pack(kind, 0, sector))
        memory.write(GuestAddress(slot.status), bytes([_STATUS_UNSET]))
        readable = [(slot.address, _HEADER.size)]
        writable = [(slot.status, 1)]
        if payload:
            memory.write(slot.data, payload)
            readable.append((slot.data, len(payload)))
        if length:
            writable.insert(0, (slot.data, length))
        self._busy[self._vring.submit(readable, writable, indirect=self._indirect)] = slot

    def kick(self) -> None:
        """Make what was submitted visible to the device."""
        self._vring.kick()

    def collect(self, timeout: float = 10.0) -> list[tuple[Completion, bytes]]:
        """Wait for at least one completion; each with the data that was asked for.

        Raises `SessionError` when nothing completes within `timeout` seconds.
        """
        memory = self._session.memory
        finished = []
        for identity, written in self._vring.completions(timeout):
            slot = self._busy.pop(identity)
            status = memory.read(slot.status, 1)[0]
            data = memory.read(slot.data, slot.length) if slot.length and status == S_OK else b""
            finished.append((Completion(slot.tag, status, written), data))
            self._free.append(slot)
        return finished

    def abandon(self) -> list[object]:
        """Forget what is in flight, for a session that has ended; the tags of it."""
        slots = list(self._busy.values())
        self._busy.clear()
        self._free += slots
        return [slot.tag for slot in slots]

    # -- one at a time --------------------------------------------------------------------------

    def request(self, kind: int, sector: int = 0, payload: bytes = b"", length: int = 0) -> bytes:
        """Submit one request and wait for it. Raises `BlockError` for a status other than OK."""
        if self._busy:
            raise BlockError(kind, sector, _STATUS_UNSET)
        self.submit(kind, sector, payload, length)
        self.kick()
        ((completion, data),) = self.collect()
        if completion.status != S_OK:
            raise BlockError(kind, sector, completion.status)
        return data

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at byte `offset`, both multiples of 512."""
        return b"".join(
            self.request(T_IN, (offset + start) // SECTOR, length=min(self._max_io, length - start))
            for start in range(0, length, self._max_io)
        )

    def write(self, offset: int, data: bytes) -> None:
        """Write at byte `offset`, a multiple of 512, as `len(data)` is."""
        for start in range(0, len(data), self._max_io):
            piece = data[start : start + self._max_io]
            self.request(T_OUT, (offset + start) // SECTOR, payload=piece)

    def flush(self) -> None:
        """Have everything that was written made durable."""
        self.request(T_FLUSH)

    def get_id(self) -> bytes:
        """The disk's serial number, without its padding."""
        return self.request(T_GET_ID, length=ID_LENGTH).rstrip(b"\0")

    def discard(self, offset: int, length: int) -> None:
        """Tell the device that a range is not needed any more."""
        self.request(T_DISCARD, payload=_RANGE.pack(offset // SECTOR, length // SECTOR, 0))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make a range read as zeroes, and deallocate it when `unmap` allows that."""
        payload = _RANGE.pack(offset // SECTOR, length // SECTOR, int(unmap))
        self.request(T_WRITE_ZEROES, payload=payload)
