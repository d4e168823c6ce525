"""virtio-blk over a file or block device.

A request (virtio 1.3, 5.2.6) is a header {le32 type, le32 reserved, le64 sector}, data, and a
status byte. A sector is 512 bytes. Reads and writes go straight between guest memory and the file,
without a copy. C does plain requests, a batch at a time. Python does rare and invalid ones, and all
requests where there is no C engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterator
from functools import partial
from typing import Final

from virtqueue import (
    DONE,
    Batch,
    Chain,
    CHandler,
    FileAction,
    FileHandler,
    UringUnavailable,
)

from ...device.base import VirtioDevice
from ...device.request import QueueInfo
from ...errors import DeviceBusy, DeviceError, DeviceRefused
from ...rate_limited_log import RateLimited
from . import image_lock
from .image_lock import ImageLock, Locking
from .store import FileStore
from .virtio_blk import (
    F_BLK_SIZE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    ID_LENGTH,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)

log: logging.Logger = logging.getLogger("vhost_backend.blk")

_NAMES: Final = {
    T_IN: "read",
    T_OUT: "write",
    T_FLUSH: "flush",
    T_GET_ID: "identity",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "write zeroes",
}
_HEADER: Final = struct.Struct("<I4xQ")
_STATUS: Final = 2  # the status in a `DONE`
_RANGE: Final = struct.Struct("<QII")
# capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, topology (exponent, alignment,
# minimum and optimal I/O size), writeback, num_queues, discard (sectors, segments, alignment),
# write zeroes (sectors, segments, may unmap), secure erase (sectors, segments, alignment).
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3xIII")

_UNMAP: Final = 1
# One request may discard or zero this much, so that no request keeps its queue for long.
_MAX_RANGE_SECTORS: Final = (1 << 31) // SECTOR
_MAX_RANGES: Final = 16

# The first bytes of images that are not raw.
_FORMATS: Final = (
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "QED"),
    (b"KDMV", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
)


class BlockDevice(VirtioDevice):
    """A disk whose content is the file at `path`.

    - `read_only` refuses every change.
    - `num_queues` is the number of queues, each with a worker thread of its own.
    - `queue_size` is the ring size that the driver is advised not to exceed.
    - `serial` is up to 20 bytes of ASCII that the guest reads as the disk's identity.
    - `seg_max` is the most data segments of one request, at most two fewer than `queue_size`.
    - `direct` bypasses the page cache (O_DIRECT) for aligned requests, and works on many of them at
      a time by an io_uring if the kernel permits one.
    - `locking` chooses the locks that the image has while rings run, flock and QEMU's: "auto" takes
      them where the file system has them, "on" fails where it has none, "off" takes none.

    The size is looked up anew for each front-end. Raises `DeviceError` when the image is missing,
    cannot be opened, holds no whole sector, or cannot be locked as `locking` demands.
    """

    device_id = 2
    status_byte = True
    error_status = S_IOERR
    #: Request types that are never done in C, for a subclass that overrides `request`.
    python_types: frozenset[int] = frozenset()

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        num_queues: int = 1,
        queue_size: int = 1024,
        serial: str = "",
        seg_max: int = 126,
        direct: bool = False,
        locking: Locking = "auto",
    ) -> None:
        self.path: str = os.fsdecode(path)
        self.name: str = self.path
        self.read_only = read_only
        self.num_queues = num_queues
        self.queue_size = queue_size
        for name, number, most in (
            ("num_queues", num_queues, 0xFFFF),
            ("queue_size", queue_size, 1 << 15),
            ("seg_max", seg_max, 0xFFFF_FFFF),
        ):
            if not isinstance(number, int) or not 0 <= number <= most:
                raise DeviceError(f"{name} is {number!r}: a number up to {most}")
        if not isinstance(serial, str):
            raise DeviceError(f"serial {serial!r} is not text")
        try:
            self.serial: bytes = serial.encode("ascii")
        except UnicodeEncodeError:
            raise DeviceError(f"serial {serial!r} is not ASCII") from None
        if len(self.serial) > ID_LENGTH:
            raise DeviceError(f"serial {serial!r} is longer than {ID_LENGTH} bytes")
        # A request without an indirect table must fit into the ring, with its header and status.
        self.seg_max: int = max(1, min(seg_max, queue_size - 2))
        # A driver that has not accepted FLUSH cannot ask for durability (5.2.6.2).
        self._durable_writes = True
        self._handlers: list[FileHandler] = []
        self._faults = RateLimited(log)
        self._running = False
        self.features: int = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ
        self.features |= F_RO if read_only else F_DISCARD | F_WRITE_ZEROES
        self._store = FileStore(self.path, read_only=read_only, direct=direct)
        try:
            size = self._store.size()
            self._lock = ImageLock(self._store.fd, self.path, writes=not read_only, locking=locking)
            self.capacity: int = size // SECTOR
            self._config = self._build_config()
            self._warn_about(size)
        except BaseException:
            self._store.close()
            raise

    def _build_config(self) -> bytes:
        ranges = 0 if self.read_only else _MAX_RANGE_SECTORS
        segments = 0 if self.read_only else _MAX_RANGES
        return _CONFIG.pack(
            *(self.capacity, 0, self.seg_max, 0, 0, 0, SECTOR),
            *(3, 0, 1, 0),  # physical blocks of 4 KiB
            *(0, self.num_queues),
            *(ranges, segments, 8),
            *(ranges, segments, 1),
            *(0, 0, 0),
        )

    def close(self) -> None:
        """Close the image."""
        try:
            if not self._store.closed:
                self._lock.close()
        finally:
            self._faults.flush()
            self._handlers.clear()
            self._store.close()

    def _warn_about(self, size: int) -> None:
        """Log whatever looks like a mistake of the user."""
        if size % SECTOR:
            log.warning(
                "%s: %d bytes after the last whole sector are not visible to the guest",
                self.path,
                size % SECTOR,
            )
        begin = b""
        with contextlib.suppress(OSError):  # the guest will find a sector that cannot be read
            begin = os.pread(self._store.fd, SECTOR, 0)
        for start, kind in _FORMATS:
            if not begin.startswith(start):
                continue
            log.warning(
                "%s: looks like a %s image; it is served as it is, and the guest sees that format's"
                " own bytes (qemu-img convert -O raw makes a disk of it)",
                self.path,
                kind,
            )
        other = self._lock.others()
        if other is not None:
            log.warning("%s: %s has it open, too; only one of them can run", self.path, other)

    def started(self) -> None:
        """Lock the image while rings run: a writer excludes other writers and readers.

        The lock cannot be taken earlier: in a migration both sides have the image open, and run one
        after the other.
        """
        try:
            self._lock.try_acquire()
        except image_lock.ImageInUse as error:
            # udev and others lock a disk for a moment while they look at it.
            raise DeviceBusy(str(error), image_lock.PATIENCE) from None
        except DeviceError as error:
            raise DeviceRefused(str(error)) from None
        self._running = True

    def stopped(self) -> None:
        """Flush and unlock the image; it is unlocked even when the flush fails."""
        self._running = False
        if not self._store.closed:
            try:
                os.fsync(self._store.fd)
            except OSError as error:
                log.error("%s: the guest's last writes may be lost: %s", self.path, error.strerror)
            finally:
                self._lock.release()

    def acked_features(self, features: int) -> None:
        """Make every write durable when the driver has not accepted FLUSH."""
        if not self._running:
            self._look_up_size()
        self._durable_writes = not features & F_FLUSH
        for handler in self._handlers:
            handler.durable = self._durable_writes

    def get_config(self, offset: int, size: int) -> bytes:
        """Part of `struct virtio_blk_config`, little-endian; bytes behind it read as zero."""
        if not self._running:
            self._look_up_size()
        return self._config[offset : offset + size].ljust(size, b"\0")

    def _look_up_size(self) -> None:
        """Look up the image's size, which may have changed since the last front-end."""
        if self._store.closed:
            return
        try:
            capacity = self._store.size() // SECTOR
        except (DeviceError, OSError) as error:
            log.warning("%s: its size stays as it was: %s", self.path, error)
            return
        if capacity != self.capacity:
            log.info("%s: has %d sectors now, had %d", self.path, capacity, self.capacity)
            self.capacity = capacity
            self._config = self._build_config()
            for handler in self._handlers:
                handler.length = capacity * SECTOR

    def set_config(self, offset: int, data: bytes) -> None:
        """Refuse: no field is writable (`writeback` needs CONFIG_WCE, which is not offered)."""
        raise DeviceRefused("no field of this disk's configuration is writable")

    # -- requests -------------------------------------------------------------------------------

    def batch_handler(self, queue: int) -> CHandler | None:
        """The handler in C for plain reads, writes and flushes; used only with the C engine.

        It leaves the types in `python_types` to Python. There is none for a subclass that has its
        own `handle_batch`.
        """
        if type(self).handle_batch is not BlockDevice.handle_batch:
            return None
        actions = {T_IN: FileAction.READ, T_FLUSH: FileAction.SYNC}
        if not self.read_only:
            actions[T_OUT] = FileAction.WRITE
        for kind in self.python_types:
            actions.pop(kind, None)
        store = self._store
        make = partial(
            FileHandler,
            store.fd if store.direct_fd < 0 else store.direct_fd,
            self.capacity * SECTOR,
            actions,
            unit=SECTOR,
            durable=self._durable_writes,
        )
        try:
            # The page cache needs no ring: see "Bulk data movement" in docs/virtqueue.md.
            handler = make(uring=store.direct_fd >= 0)
        except UringUnavailable as error:
            log.info("%s: requests wait for the disk one at a time: %s", self.path, error)
            handler = make()
        self._handlers.append(handler)
        handler.durable = self._durable_writes  # it may just have changed
        return handler

    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        """Work on the requests that are left, in the order they were taken.

        Each entry of `batch.done` gets the result of its request.
        """
        for position in batch.left:
            chain = batch[position]
            try:
                status, written = self._request(chain, batch.done[position * DONE.size + _STATUS])
            except OSError as error:
                self._fault(chain, error)
                status, written = S_IOERR, 1
            if status:
                queue.counters.errors += 1
            DONE.pack_into(batch.done, position * DONE.size, chain.head, status, 1, written)

    def describe(self, header: bytes) -> str:
        """The request's type, sector and image, for the log."""
        kind, sector = _HEADER.unpack(header)
        return f"{_NAMES.get(kind, f'type {kind}')} at sector {sector} of {self.path}"

    def _fault(self, chain: Chain, error: OSError) -> None:
        """Log a request that failed on the file."""
        kind, sector = _HEADER.unpack(chain.header)
        length = {
            T_IN: chain.writable_length - 1,
            T_OUT: chain.readable_length - _HEADER.size,
        }.get(kind, 0)
        place = f" of {length} bytes at sector {sector}" if length else ""
        self._faults.warning(
            "%s: %s%s failed: %s",
            self.path,
            _NAMES.get(kind, f"request of type {kind}"),
            place,
            error.strerror or error,
        )

    def _request(self, chain: Chain, failed: int) -> tuple[int, int]:
        """Serve a request; `failed` is the error number that it met in C, or 0."""
        if chain.readable_length < _HEADER.size:
            return S_IOERR, 1
        kind, sector = _HEADER.unpack(chain.header)
        if failed and kind == T_FLUSH:
            # The kernel reports a failed write-back only once: a second flush would succeed.
            raise OSError(failed, os.strerror(failed))
        return self.request(kind, sector * SECTOR, chain)

    def request(self, kind: int, offset: int, chain: Chain) -> tuple[int, int]:
        """Serve one request of any type.

        Returns its status, and the number of bytes written into the chain with the status byte.
        `offset` is the header's, in bytes, and unchecked; in `chain` the header lies before the
        data. A subclass that takes over a type overrides this method and names the type in
        `python_types`. An `OSError` is logged and becomes S_IOERR.
        """
        if kind == T_IN:
            length = chain.writable_length - 1
            if not self._inside(offset, length):
                return S_IOERR, 1
            if not self._store.read(_first(chain.writable, length), offset):
                return S_IOERR, 1
            return S_OK, length + 1
        if kind == T_OUT:
            length = chain.readable_length - _HEADER.size
            if self.read_only or not self._inside(offset, length):
                return S_IOERR, 1
            data = _behind(chain.readable, _HEADER.size)
            self._store.write(data, offset, self._durable_writes)
            return S_OK, 1
        if kind == T_FLUSH:
            self._store.flush()
            return S_OK, 1
        if kind == T_GET_ID:
            if chain.writable_length - 1 < ID_LENGTH:
                return S_IOERR, 1
            chain.write(self.serial.ljust(ID_LENGTH, b"\0"))
            return S_OK, ID_LENGTH + 1
        if kind in (T_DISCARD, T_WRITE_ZEROES):
            if self.read_only:
                return S_IOERR, 1
            return self._ranges(kind, chain.read()[_HEADER.size :]), 1
        return S_UNSUPP, 1

    def _inside(self, offset: int, length: int) -> bool:
        """Whether the range is whole sectors of the disk."""
        return not length % SECTOR and offset + length <= self.capacity * SECTOR

    def _ranges(self, kind: int, payload: bytes) -> int:
        """DISCARD and WRITE_ZEROES: {le64 sector, le32 num_sectors, le32 flags} each (5.2.6)."""
        if not payload or len(payload) % _RANGE.size or len(payload) > _MAX_RANGES * _RANGE.size:
            return S_IOERR
        ranges = list(_RANGE.iter_unpack(payload))
        for sector, count, flags in ranges:
            if flags & ~(_UNMAP if kind == T_WRITE_ZEROES else 0):
                return S_UNSUPP
            if count > _MAX_RANGE_SECTORS or sector + count > self.capacity:
                return S_IOERR
        for sector, count, flags in ranges:
            offset, length = sector * SECTOR, count * SECTOR
            if not length:
                continue
            if kind == T_DISCARD:
                self._store.discard(offset, length)
            else:
                self._store.write_zeroes(offset, length, bool(flags & _UNMAP))
        if self._durable_writes:
            self._store.flush()
        return S_OK


def _first(views: list[memoryview], length: int) -> Iterator[memoryview]:
    """The first `length` bytes of the pieces: all but the status byte."""
    for view in views:
        if length <= 0:
            break
        yield view[:length]
        length -= len(view)


def _behind(views: list[memoryview], skip: int) -> Iterator[memoryview]:
    """The bytes of the pieces behind the first `skip` bytes, which are the header."""
    for view in views:
        if skip < len(view):
            yield view[skip:]
        skip = max(0, skip - len(view))
