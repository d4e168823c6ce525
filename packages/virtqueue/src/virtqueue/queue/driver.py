"""The driver's side of one ring: offers chains, collects the used ones.

It serves an embedded front-end, tests and load generators.  It distrusts the device as much as the
device's side distrusts a driver.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..config import RingConfig, ring_parts
from ..engine.python.walk import INDIRECT, WRITABLE
from ..errors import QueueBroken, UsageError
from ..layout import CHAIN_LIMIT, MAX_CHAIN_LENGTH
from ..memory import access
from ..memory.placement import Placement
from ..memory.table import READ, WRITE, Broken, Memory, Missing, Table
from .driver_packed import DriverPackedRing
from .driver_split import DriverSplitRing

Buffer = tuple[int, int]
"""(guest address or IOVA, bytes)."""


class DriverQueue:
    """Offers chains to a device (virtio 2.7.13, 2.8.21) and collects the used ones.

    ``config`` and ``memory`` are those of the device's side: ring addresses are front-end user
    addresses, or IOVAs with ``iommu``.  ``tables`` is the guest address (or IOVA) of room for
    indirect tables, ``table_length`` descriptors for each of the ring's: see `tables_size`.
    A table may be longer than the ring, as Linux's drivers make them and devices take them,
    although the specification has it otherwise.  Starts on a ring of zeroes.

    Not thread-safe.  Raises `UsageError` for a ring that is not in memory.
    """

    def __init__(
        self,
        config: RingConfig,
        memory: Memory,
        *,
        tables: int | None = None,
        table_length: int = 16,
    ) -> None:
        config.check()
        self._config = config
        self._memory = memory
        self._table = Table.of(memory)
        self._tables = tables
        self._table_length = min(table_length, max(CHAIN_LIMIT, config.size))
        #: Kept, as parts of the ring may be mapped for this object alone.
        self._placed: list[Placement] = []
        parts = ring_parts(config.size, config.packed)
        addresses = (config.descriptor_address, config.driver_address, config.device_address)
        try:
            for (_, _, length), address in zip(parts, addresses, strict=True):
                self._placed.append(
                    Placement(
                        self._table.ring_pieces(address, length, READ | WRITE, config.iommu, ())
                    )
                )
        except (Broken, Missing) as error:
            raise UsageError(f"the ring is not in guest memory: {error}") from error
        hosts = [part.host for part in self._placed]
        self._side: DriverSplitRing | DriverPackedRing
        kind = DriverPackedRing if config.packed else DriverSplitRing
        try:
            self._side = kind(config, hosts, self._table)
        except Broken as error:
            # See `access`.
            message = "a big-endian or odd available ring needs memory that cannot vanish"
            raise UsageError(message) from error

    def add(
        self,
        readable: Iterable[Buffer] = (),
        writable: Iterable[Buffer] = (),
        indirect: bool = False,
    ) -> int:
        """Write a chain into the ring without exposing it; the id that `collect` will return.

        Buffers are (guest address or IOVA, bytes).  ``indirect`` puts their descriptors into a
        table of its own.  Raises `UsageError` when there is no room (see `free`).
        """
        read, write = list(readable), list(writable)
        count = len(read) + len(write)
        if not count:
            raise UsageError("a chain has at least one buffer")
        if not indirect and count > self._config.size:
            raise UsageError(
                f"a chain of {count} descriptors does not fit a ring of {self._config.size}"
            )
        if sum(length for _, length in read + write) > MAX_CHAIN_LENGTH:
            raise UsageError("a chain has less than 4 GiB")
        if any(length <= 0 for _, length in read + write):
            raise UsageError("a buffer has at least one byte")
        descriptors = [(address, length, 0) for address, length in read]
        descriptors += [(address, length, WRITABLE) for address, length in write]
        room = sum(length for _, length in write)
        if self.free < (1 if indirect else count):
            raise UsageError(f"{self.free} descriptors are free, not {count}")
        try:
            if not indirect:
                return self._side.add(descriptors, room)
            if self._tables is None or not self._config.indirect or count > self._table_length:
                raise UsageError("no room for an indirect table of this length")
            address = self._tables + 16 * self._table_length * self._side.next_identity()
            self._write(address, self._side.table(descriptors))
            return self._side.add([(address, 16 * count, INDIRECT)], room)
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def _write(self, address: int, data: bytes) -> None:
        position = 0
        try:
            pieces = self._table.pieces(address, len(data), WRITE, self._config.iommu, ())
        except (Broken, Missing) as error:
            raise UsageError(f"the room for tables is not in guest memory: {error}") from error
        for piece in pieces:
            access.write(piece, 0, data[position : position + piece.length])
            position += piece.length

    def publish(self) -> bool:
        """Expose the chains that were added; true when the device wants a kick."""
        try:
            return self._side.publish()
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def collect(self, limit: int | None = None) -> list[tuple[int, int]]:
        """(id, bytes written) of chains that the device used, in the order it returned them.

        Raises `QueueBroken` (USED_RING) when the device returns a chain that it was not given.
        Every method raises it (TRUNCATED) when the ring's memory is gone and nothing guards it.
        """
        try:
            return self._side.collect(self._config.size if limit is None else limit)
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def enable_notification(self) -> bool:
        """Ask for calls; true when used chains are there already: collect them first."""
        try:
            return self._side.enable()
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def disable_notification(self) -> None:
        """Tell the device that calls are not needed (a hint)."""
        try:
            self._side.disable()
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    @property
    def free(self) -> int:
        """Descriptors of the ring that are free."""
        return self._side.free

    @property
    def tables_size(self) -> int:
        """Bytes of the room that ``tables`` names."""
        return 16 * self._table_length * self._config.size

    @property
    def config(self) -> RingConfig:
        """How the ring is set up."""
        return self._config
