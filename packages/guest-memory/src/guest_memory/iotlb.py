"""The device's IOTLB: translations of I/O virtual addresses to user addresses, with rights."""

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from .abi import IOTLB_RECORD
from .addresses import ADDRESS_SPACE, Access, Iova, UserAddress, fits
from .errors import AccessDenied, IotlbMiss, OutOfBounds, UsageError


class IotlbEntry(NamedTuple):
    """One translation.

    Attributes:
        iova: first I/O virtual address.
        size: bytes.
        user_address: the front-end's virtual address of the first byte.
        access: 1 read, 2 write, 3 both.
    """

    iova: Iova
    size: int
    user_address: UserAddress
    access: int


class FrozenIotlb:
    """The entries at one moment, sorted, and the C array of them."""

    __slots__ = ("entries", "records", "starts")

    def __init__(self, entries: list[IotlbEntry], starts: list[int], records: list[bytes]) -> None:
        self.entries: list[IotlbEntry] = entries
        self.starts: list[int] = starts
        self.records: bytes = b"".join(records)

    def lookup(self, address: int, length: int, access: int) -> list[tuple[int, int]]:
        """Translate a range into (user address, length) pieces; see `Iotlb.lookup`."""
        if not fits(address, length):
            raise OutOfBounds(address, length)
        pieces: list[tuple[int, int]] = []
        position, left = address, length
        index = bisect_right(self.starts, address) - 1
        while left:
            if not 0 <= index < len(self.entries):
                raise IotlbMiss(position, left, access)
            start, size, user, allowed = self.entries[index]
            offset = position - start
            if not 0 <= offset < size:
                raise IotlbMiss(position, left, access)
            if access & ~allowed:
                raise AccessDenied(position, min(left, size - offset), access)
            step = min(left, size - offset)
            if pieces and sum(pieces[-1]) == user + offset:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + step)
            else:
                pieces.append((user + offset, step))
            position += step
            left -= step
            index += 1
        return pieces


class Iotlb:
    """A bounded table of translations (vhost-user: "IOMMU support"). Safe to use from any thread.

    A snapshot of guest memory takes the entries over with `GuestMemory.with_iotlb`, and does not
    see later changes: after `insert` and `invalidate` make and publish a new snapshot.

    Args:
        limit: the most entries that are kept. New ones replace the oldest, whose ranges are then
            missed again.
        on_miss: called by `lookup` with (iova, length, access) of the missing part, without any
            lock held. When it returns True, `lookup` tries again, and must get further than before.
    """

    def __init__(
        self,
        limit: int = 2048,
        on_miss: Callable[[Iova, int, int], bool] | None = None,
    ) -> None:
        if limit < 1:
            raise UsageError("an IOTLB needs room for an entry")
        self.limit = limit
        self._on_miss = on_miss
        self._lock = threading.Lock()
        # Three lists in step, sorted by iova, and the order in which the entries came.
        self._entries: list[IotlbEntry] = []
        self._starts: list[int] = []
        self._records: list[bytes] = []
        self._age: OrderedDict[int, None] = OrderedDict()
        self._frozen: FrozenIotlb | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> tuple[IotlbEntry, ...]:
        """All entries, sorted by iova."""
        return tuple(self.freeze().entries)

    def freeze(self) -> FrozenIotlb:
        """Return the entries of this moment as an immutable table."""
        with self._lock:
            if self._frozen is None:
                self._frozen = FrozenIotlb(self._entries[:], self._starts[:], self._records)
            return self._frozen

    def insert(self, iova: Iova, size: int, user_address: UserAddress, access: int) -> None:
        """Add a translation (VHOST_IOTLB_UPDATE); it replaces older ones of its range.

        Args:
            iova: first I/O virtual address.
            size: bytes, at least 1.
            user_address: the front-end's virtual address of the first byte.
            access: 1 read, 2 write, 3 both.

        Raises:
            OutOfBounds: a range is empty or runs beyond 64 bits.
            AccessDenied: the access is none of 1, 2 and 3.
        """
        if size < 1 or size >= ADDRESS_SPACE or not fits(iova, size):
            raise OutOfBounds(iova, size)
        if not fits(user_address, size):
            raise OutOfBounds(user_address, size)
        if access not in (1, 2, 3):
            raise AccessDenied(iova, size, access)
        with self._lock:
            self._cut(iova, size)
            self._put(IotlbEntry(iova, size, user_address, int(access)))
            self._evict()

    def invalidate(self, iova: Iova, size: int) -> None:
        """Forget all translations of a range (VHOST_IOTLB_INVALIDATE); entries may be cut in two.

        Args:
            iova: first I/O virtual address.
            size: bytes; a range that runs beyond 64 bits ends there, 0 does nothing.
        """
        if iova < 0 or size < 0:
            raise OutOfBounds(iova, size)
        with self._lock:
            self._cut(iova, size)
            self._evict()

    def clear(self) -> None:
        """Forget all entries."""
        with self._lock:
            self._entries.clear()
            self._starts.clear()
            self._records.clear()
            self._age.clear()
            self._frozen = None

    def lookup(
        self, iova: Iova, length: int, access: int = Access.READ
    ) -> list[tuple[UserAddress, int]]:
        """Translate a range, which may span several entries.

        Returns:
            (user address, length) pieces in order; neighbours that continue each other are one.

        Raises:
            IotlbMiss: names the first missing byte, and the length from there.
            AccessDenied: an entry is there but does not allow the access.
            OutOfBounds: the range runs beyond 64 bits.
        """
        reached = -1
        while True:
            try:
                return [
                    (UserAddress(user), size)
                    for user, size in self.freeze().lookup(iova, length, access)
                ]
            except IotlbMiss as miss:
                # Each miss must be further on than the last, or this would never end.
                if (
                    self._on_miss is None
                    or miss.address <= reached
                    or not self._on_miss(Iova(miss.address), miss.length, miss.access)
                ):
                    raise
                reached = miss.address

    def _put(self, entry: IotlbEntry) -> None:
        index = bisect_right(self._starts, entry.iova)
        self._entries.insert(index, entry)
        self._starts.insert(index, entry.iova)
        self._records.insert(index, IOTLB_RECORD.pack(*entry))
        self._age[entry.iova] = None

    def _evict(self) -> None:
        while len(self._entries) > self.limit:
            oldest, _ = self._age.popitem(last=False)
            index = bisect_right(self._starts, oldest) - 1
            del self._entries[index], self._starts[index], self._records[index]
        self._frozen = None

    def _cut(self, iova: int, size: int) -> None:
        """Remove a range; the remaining parts of cut entries count as new."""
        if not size:
            return
        end = iova + size
        first = max(bisect_right(self._starts, iova) - 1, 0)
        if first < len(self._entries):
            entry = self._entries[first]
            first += entry.iova + entry.size <= iova
        last = bisect_left(self._starts, end)
        hit = self._entries[first:last]
        if not hit:
            return
        del self._entries[first:last], self._starts[first:last], self._records[first:last]
        for entry in hit:
            del self._age[entry.iova]
        before, after = iova - hit[0].iova, hit[-1].iova + hit[-1].size - end
        if before > 0:
            self._put(hit[0]._replace(size=before))
        if after > 0:
            user = hit[-1].user_address + hit[-1].size - after
            self._put(IotlbEntry(Iova(end), after, UserAddress(user), hit[-1].access))
